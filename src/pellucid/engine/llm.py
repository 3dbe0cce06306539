"""`LLM`: a model in this process, for scripts and notebooks. Names and shapes are vLLM's.

    with LLM("smollm2-135m-instruct") as llm:
        params = SamplingParams(temperature=0, max_tokens=16)
        print(llm.generate(["The capital of France is"], params)[0].outputs[0].text)

`generate` and `chat` return whole answers in the order of their prompts; `stream` and `chat_stream`
yield one answer as it grows; `embed` returns embeddings. All of them may be used at once and from
several threads: the core runs in its own thread (`core_thread`), and each call reads from its own
mailbox.
"""

import time
import weakref
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ..config import ModelConfig
from ..errors import named_errors
from ..outputs import EmbeddingRequestOutput, PooledOutput, RequestOutput
from ..pooling_params import PoolingParams
from ..sampling_params import SamplingParams, listed_params, params_for_prompts
from ..structured import GrammarCompiler
from ..tokenizer import Tokenizer
from ..units import format_count
from .admission import Submission, tokenize_bad_words
from .core_thread import CoreThread
from .loader import load_engine
from .mailbox import ThreadMailbox
from .options import build_engine_config
from .pooling import as_embedding, check_lengths, resolve_pooling
from .prompts import (
    Message,
    Prompt,
    TokenizedPrompt,
    list_conversations,
    list_prompts,
    longest_prompt,
    tokenize_chat,
    tokenize_prompt,
    tokenize_prompts,
    with_priorities,
)
from .stats import EngineStats

__all__ = ["LLM"]


class LLM:
    """One loaded model, for any number of threads. Close it, use it as a context manager, or drop
    it: its thread ends, and its memory is freed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        cache_dir: Path | None = None,
        progress: bool = False,
        **options: Any,
    ) -> None:
        """Load `model`: a .gguf file, a folder with config.json and *.safetensors, a known name or
        a Hugging Face ORG/NAME.

        A known name (see `pellucid list`) is fetched into `cache_dir` if it is not there yet, with
        a progress bar on standard error if `progress` is set. The options are the fields of
        `EngineConfig` (`max_model_len`, `max_num_seqs`, `kv_cache_memory`, …) and the options of
        the backend (`threads`, `isa`). Raises a PellucidError that says what is wrong.
        """
        self.config = build_engine_config(options)
        engine = load_engine(model, self.config, cache_dir=cache_dir, progress=progress)
        self.path = engine.path
        self.model_config: ModelConfig = engine.model_config
        self.tokenizer: Tokenizer = engine.tokenizer
        self.generation_config = engine.generation_config
        self._pooling = engine.pooling
        # the longest prompt and output together, in tokens
        self.max_model_len = engine.core.scheduler.max_model_len
        self._grammars = GrammarCompiler(engine.tokenizer)
        self._thread = CoreThread(engine.core)
        weakref.finalize(self, self._thread.stop)  # also when the interpreter ends

    def close(self) -> None:
        """Stop after the current step and free the memory. Open streams raise EngineDeadError, as
        does every later call.
        """
        self._thread.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> EngineStats:
        """The state of the engine, and its counts since it was loaded."""
        return self._thread.call(lambda core: core.stats())

    def reset_prefix_cache(self) -> bool:
        """Forget all cached prefixes, under vLLM's name; running requests keep theirs."""
        self._thread.call(lambda core: core.scheduler.kv.forget())
        return True

    def summary(self) -> str:
        """One sentence about the prefix cache's hits so far."""
        stats = self.stats()
        hit = stats.num_cached_tokens / max(1, stats.num_prompt_tokens)
        preemptions = format_count(stats.num_preemptions, "preemption")
        return f"{hit:.1%} of prompt tokens from the cache · {preemptions}"

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer, under vLLM's name for it."""
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend (`generation_config`), or else the defaults of
        SamplingParams. As in vLLM.
        """
        return SamplingParams(**self.generation_config)  # type: ignore[arg-type]

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        parse_special: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[RequestOutput]:
        """Complete each prompt; the answers come in the order of the prompts. SamplingParams and
        priority are one value for all prompts, or a list with one for each. Without SamplingParams,
        those of `get_default_sampling_params` are used.

        `parse_special=False`: special tokens that a prompt spells are read as plain text.
        `truncate_prompt_tokens`: use only that many last tokens of each prompt. A progress bar is
        shown if standard error is a terminal. If one prompt cannot be served, RequestError is
        raised and none is run.
        """
        tokenized = tokenize_prompts(
            self.tokenizer,
            prompts,
            parse_special=parse_special,
            truncate_prompt_tokens=truncate_prompt_tokens,
            max_tokens=longest_prompt(self.max_model_len, sampling_params),
        )
        return self._run(with_priorities(tokenized, priority), sampling_params, use_tqdm, "prompts")

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: each a list of {"role": …, "content": …}, rendered
        with the model's own chat template. The keywords are those of
        `Tokenizer.apply_chat_template`.
        """
        longest = longest_prompt(self.max_model_len, sampling_params)
        conversations, tokenized = list_conversations(messages), []
        for name, conversation in zip(
            _names("messages", conversations), conversations, strict=True
        ):
            with named_errors(name):
                prompt = tokenize_chat(
                    self.tokenizer,
                    conversation,
                    add_generation_prompt=add_generation_prompt,
                    tools=tools,
                    chat_template=chat_template,
                    chat_template_kwargs=chat_template_kwargs,
                    continue_final_message=continue_final_message,
                    max_tokens=longest,
                )
            tokenized.append(prompt)
        return self._run(tokenized, sampling_params, use_tqdm, "messages")

    def embed(
        self,
        prompts: Prompt | Iterable[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: int | Sequence[int] | None = None,
        parse_special: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """The embedding of each prompt, in their order: `output.outputs.embedding`, a list of
        floats. PoolingParams and priority are one value for all prompts, or a list with one for
        each. Without PoolingParams, embeddings are pooled as the model's file says, or else the
        hidden state of the last token, and have the length 1.

        A prompt that the context does not hold is refused. `truncate_prompt_tokens` replaces that
        of the PoolingParams: use only so many last tokens of each prompt; -1: as many as the
        context holds. If one prompt cannot be served, RequestError is raised and none is run.
        Embeddings run together with the requests of other calls.
        """
        listed = list_prompts(prompts)
        params = listed_params("pooling_params", pooling_params, len(listed), PoolingParams)
        params = [resolve_pooling(p, self._pooling) for p in params]
        if truncate_prompt_tokens is not None:
            params = [replace(p, truncate_prompt_tokens=truncate_prompt_tokens) for p in params]
        longest = longest_prompt(self.max_model_len, params)
        tokenized = tokenize_prompts(
            self.tokenizer, listed, parse_special=parse_special, max_tokens=longest
        )
        check_lengths(tokenized, longest)
        prioritized, names = with_priorities(tokenized, priority), _names("prompts", tokenized)
        submissions = [
            Submission(self._thread.new_id(), prompt, each, name=name)
            for prompt, each, name in zip(prioritized, params, names, strict=True)
        ]
        outputs = dict(self._as_completed(submissions, use_tqdm, "embed"))
        return [as_embedding(outputs[i], f"prompts[{i}]") for i in range(len(submissions))]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        parse_special: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt, yielding the answer so far after each step.

        Nothing runs before the first `next`; closing the iterator aborts the request.
        """
        tokenized = tokenize_prompt(
            self.tokenizer,
            prompt,
            parse_special=parse_special,
            truncate_prompt_tokens=truncate_prompt_tokens,
            max_tokens=longest_prompt(self.max_model_len, sampling_params),
        )
        return self._stream(tokenized, sampling_params)

    def chat_stream(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, rendered as by `chat` and yielded as by `stream`."""
        tokenized = tokenize_chat(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            continue_final_message=continue_final_message,
            max_tokens=longest_prompt(self.max_model_len, sampling_params),
        )
        return self._stream(tokenized, sampling_params)

    def _run(
        self,
        prompts: list[TokenizedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        argument: str,
    ) -> list[RequestOutput]:
        each = self.as_completed(prompts, sampling_params, use_tqdm=use_tqdm, argument=argument)
        outputs = dict(each)
        return [outputs[i] for i in range(len(prompts))]

    def as_completed(
        self,
        prompts: Sequence[TokenizedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        argument: str = "prompts",
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Complete tokenized prompts together; yields each answer when it is complete, with the
        index of its prompt. `argument`: the caller's argument that errors name.

        All prompts are queued, or all refused, at the first `next`. Closing the iterator aborts the
        requests that have not ended.
        """
        if sampling_params is None:
            sampling_params = self.get_default_sampling_params()
        params = params_for_prompts(sampling_params, len(prompts))
        each = zip(prompts, params, _names(argument, prompts), strict=True)
        submissions = [self._submission(*one) for one in each]
        return self._as_completed(submissions, use_tqdm)

    def _as_completed(
        self, submissions: list[Submission], use_tqdm: bool, verb: str = "generate"
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        box = ThreadMailbox([s._replace(only_whole=True) for s in submissions])
        places = {submission.request_id: i for i, submission in enumerate(submissions)}
        try:
            self._thread.submit(box)
            with _progress_bar(len(places), use_tqdm, verb) as bar:
                start, num_tokens = time.monotonic(), 0
                while places:
                    for output in self._thread.wait(box):
                        if isinstance(output, PooledOutput):
                            num_tokens += len(output.prompt_token_ids)
                        num_tokens += sum(c.num_tokens for c in output.outputs)
                        speed = num_tokens / (time.monotonic() - start)
                        bar.set_postfix_str(f"{speed:.0f} tokens/s", refresh=False)
                        bar.update()
                        yield places.pop(output.request_id), output
        finally:  # also after an error or Ctrl-C: abort what has not ended
            self._thread.leave(box)

    def _stream(
        self, prompt: TokenizedPrompt, sampling_params: SamplingParams | None
    ) -> Generator[RequestOutput, None, None]:
        (params,) = params_for_prompts(sampling_params or self.get_default_sampling_params(), 1)
        return self._outputs(self._submission(prompt, params))

    def _submission(
        self, prompt: TokenizedPrompt, params: SamplingParams, name: str = ""
    ) -> Submission:
        constraint = self._grammars.constraint(params)
        banned = tokenize_bad_words(params, self.tokenizer)
        return Submission(self._thread.new_id(), prompt, params, constraint, banned, name)

    def _outputs(self, submission: Submission) -> Generator[RequestOutput, None, None]:
        box = ThreadMailbox([submission])
        try:
            self._thread.submit(box)
            finished = False
            while not finished:
                for output in self._thread.wait(box):
                    finished = output.finished
                    yield output
        finally:
            self._thread.leave(box)


def _names(argument: str, listed: Sequence[object]) -> list[str]:
    """What errors call the entries of an argument; the only entry has no name."""
    return (
        [f"{argument}[{i}]" for i in range(len(listed))] if len(listed) > 1 else [""] * len(listed)
    )


def _progress_bar(total: int, use_tqdm: bool, verb: str) -> Any:
    from tqdm import tqdm

    # disable=None: drawn on a terminal only
    return tqdm(total=total, unit="request", desc=verb, disable=None if use_tqdm else True)
