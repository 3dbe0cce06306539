"""`LLM`: a model in this process, for scripts and notebooks. Names and shapes are vLLM's.

    llm = LLM("smollm2-135m-instruct") llm.generate(["The capital of France is"],
    SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].text

Beside `generate` and `chat`, which return whole answers in the order of their prompts, `stream` and
`chat_stream` yield one answer as it grows.
"""

import itertools
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import EngineConfig, ModelConfig
from ..errors import RequestError
from ..request import RequestOutput, SamplingParams
from ..tokenizer import Tokenizer
from .loader import load_engine
from .prompts import Message, Prompt, TokenizedPrompt, tokenize_chat, tokenize_prompt

__all__ = ["LLM"]


class LLM:
    """One loaded model. Not thread-safe."""

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

        A known name (`pellucid models` lists them) that is not here yet is fetched into
        `cache_dir`, with a bar on standard error where `progress` is set. The options are the
        fields of `EngineConfig`: `threads`, `max_model_len`, `max_num_seqs`, `kv_cache_memory`, ….
        Raises a PellucidError that says what is wrong.
        """
        self.config = EngineConfig(**options)
        engine = load_engine(model, self.config, cache_dir=cache_dir, progress=progress)
        self.path = engine.path
        self.model_config: ModelConfig = engine.model_config
        self.tokenizer: Tokenizer = engine.tokenizer
        self.generation_config = engine.generation_config
        self._core = engine.core
        self._ids = itertools.count()

    @property
    def max_model_len(self) -> int:
        """The longest prompt and output together, in tokens."""
        return self._core.scheduler.max_model_len

    def summary(self) -> str:
        """How the cache served all requests so far, in words."""
        scheduler = self._core.scheduler
        hit = scheduler.num_cached_tokens / max(1, scheduler.num_prompt_tokens)
        return (
            f"{hit:.1%} of prompt tokens from the cache · {scheduler.num_preemptions} preemptions"
        )

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
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; the answers come in the order of the prompts. One SamplingParams is
        used for all, or there is one for each.

        A bar on standard error shows the progress where that is a terminal. Raises RequestError,
        having run nothing, if a prompt cannot be served.
        """
        return self._run(
            [tokenize_prompt(self.tokenizer, p) for p in _as_list(prompts)],
            sampling_params,
            use_tqdm,
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: each a list of {"role": …, "content": …}, rendered
        with the model's own chat template.
        """
        conversations = (
            [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        )
        tokenized = [
            tokenize_chat(
                self.tokenizer, c, add_generation_prompt=add_generation_prompt, tools=tools
            )  # type: ignore[arg-type]
            for c in conversations
        ]
        return self._run(tokenized, sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Complete one prompt, yielding the answer as far as it has come after each step.

        Nothing runs before the first `next`; closing the iterator aborts the request.
        """
        return self._stream(
            tokenize_prompt(self.tokenizer, prompt), sampling_params or SamplingParams()
        )

    def chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, as `stream` does."""
        return self._stream(
            tokenize_chat(self.tokenizer, messages), sampling_params or SamplingParams()
        )

    def _run(
        self,
        prompts: list[TokenizedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        outputs = dict(self.as_completed(prompts, sampling_params, use_tqdm=use_tqdm))
        return [outputs[i] for i in range(len(prompts))]

    def as_completed(
        self,
        prompts: Sequence[TokenizedPrompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> Generator[tuple[int, RequestOutput], None, None]:
        """Complete tokenized prompts together; yields each answer when it is whole, with the place
        of its prompt.

        All is queued, or refused, at the first `next`; closing the iterator aborts what has not
        ended.
        """
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(prompts)
        if len(sampling_params) != len(prompts):
            raise RequestError(
                f"{len(sampling_params)} sampling_params are given for {len(prompts)} prompts; "
                "give one, or one for each"
            )
        places: dict[str, int] = {}  # of those that have not ended
        try:
            for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
                request_id = str(next(self._ids))
                self._core.add_request(request_id, prompt, params)
                places[request_id] = i
            with _progress_bar(len(places), use_tqdm) as bar:
                start, num_tokens = time.monotonic(), 0
                while places:
                    for output in self._core.step():
                        if output.finished and output.request_id in places:
                            num_tokens += sum(
                                len(completion.token_ids) for completion in output.outputs
                            )
                            bar.set_postfix_str(
                                f"{num_tokens / (time.monotonic() - start):.0f} tokens/s",
                                refresh=False,
                            )
                            bar.update()
                            yield places.pop(output.request_id), output
        finally:  # after an error or Ctrl-C nothing of this call stays queued
            for request_id in places:
                self._core.abort(request_id)

    def _stream(
        self, prompt: TokenizedPrompt, params: SamplingParams
    ) -> Generator[RequestOutput, None, None]:
        request_id = str(next(self._ids))
        self._core.add_request(request_id, prompt, params)
        try:
            finished = False
            while not finished:
                for output in self._core.step():
                    if output.request_id == request_id:
                        finished = output.finished
                        yield output
        finally:
            self._core.abort(request_id)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    ids = [p for p in prompts if isinstance(p, int)]
    return (
        [ids]
        if ids and len(ids) == len(prompts)
        else [p for p in prompts if not isinstance(p, int)]
    )


def _progress_bar(total: int, use_tqdm: bool) -> Any:
    from tqdm import tqdm

    # disable=None: drawn on a terminal only
    return tqdm(total=total, unit="request", desc="generate", disable=None if use_tqdm else True)
