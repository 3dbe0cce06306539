"""`LLM`: a model in this process, for scripts and notebooks. Names and shapes are vLLM's.

    llm = LLM("smollm2-135m-instruct")
    llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=16))[0].outputs[0].text

Beside `generate` and `chat`, which return whole answers in the order of their prompts, `stream` and `chat_stream` yield one answer as
it grows.
"""

import itertools
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..config import EngineConfig, ModelConfig
from ..errors import RequestError
from ..request import RequestOutput, SamplingParams
from ..tokenizer import Tokenizer
from ..weights.hub import resolve_model
from .loader import build_engine

__all__ = ["LLM", "Message", "Prompt"]

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": text} or {"prompt_token_ids": ids}
Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "…"}


class LLM:
    """One loaded model. Not thread-safe."""

    def __init__(
        self,
        model: str | Path,
        *,
        backend: str = "native",
        threads: int | None = None,
        isa: str | None = None,
        max_model_len: int | None = None,
        max_num_batched_tokens: int = 512,
        block_size: int = 16,
        kv_cache_memory: int | None = None,
        seed: int = 0,
        cache_dir: Path | None = None,
        progress: bool = False,
    ) -> None:
        """Load `model`: a .gguf file, a folder with config.json and *.safetensors, a known name or a Hugging Face ORG/NAME.

        A known name (`pellucid models` lists them) that is not here yet is fetched into `cache_dir`, with a bar on standard error where
        `progress` is set. The other options are `EngineConfig`'s. Raises a PellucidError that says what is wrong.
        """
        self.config = EngineConfig(
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            kv_cache_memory=kv_cache_memory,
            seed=seed,
            backend=backend,
            threads=threads,
            isa=isa,
        )
        self.path = resolve_model(str(model), cache_dir=cache_dir, progress=progress)
        engine = build_engine(self.path, self.config)
        self.model_config: ModelConfig = engine.model_config
        self.tokenizer: Tokenizer = engine.tokenizer
        self._core = engine.core
        self._ids = itertools.count()

    @property
    def max_model_len(self) -> int:
        """The longest prompt and output together, in tokens."""
        return self._core.scheduler.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """The tokenizer, under vLLM's name for it."""
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete each prompt; the answers come in the order of the prompts. One SamplingParams is used for all, or there is one for each.

        A bar on standard error shows the progress where that is a terminal. Raises RequestError, having run nothing, if a prompt cannot
        be served.
        """
        listed = _as_list(prompts)
        return self._run([self._tokenize(p) for p in listed], [_text_of(p) for p in listed], sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or several: each a list of {"role": …, "content": …}, rendered with the model's own chat template."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else list(messages)
        texts = [self._render(c, add_generation_prompt, tools) for c in conversations]  # type: ignore[arg-type]
        return self._run([self._encode_chat(text) for text in texts], list(texts), sampling_params, use_tqdm)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[RequestOutput, None, None]:
        """Complete one prompt, yielding the answer as far as it has come after each step.

        Nothing runs before the first `next`; closing the iterator aborts the request.
        """
        return self._stream(self._tokenize(prompt), _text_of(prompt), sampling_params or SamplingParams())

    def chat_stream(
        self, messages: Sequence[Message], sampling_params: SamplingParams | None = None
    ) -> Generator[RequestOutput, None, None]:
        """Answer one conversation, as `stream` does."""
        text = self._render(messages, True, None)
        return self._stream(self._encode_chat(text), text, sampling_params or SamplingParams())

    def _run(
        self,
        token_ids: list[list[int]],
        texts: Sequence[str | None],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params or SamplingParams()] * len(token_ids)
        if len(sampling_params) != len(token_ids):
            raise RequestError(f"{len(sampling_params)} sampling_params are given for {len(token_ids)} prompts; give one, or one for each")
        ids: list[str] = []
        done: dict[str, RequestOutput] = {}
        try:
            for tokens, text, params in zip(token_ids, texts, sampling_params, strict=True):
                request_id = str(next(self._ids))
                self._core.add_request(request_id, tokens, params, text)
                ids.append(request_id)
            with _progress_bar(len(ids), use_tqdm) as bar:
                while len(done) < len(ids):
                    for output in self._core.step():
                        if output.finished and output.request_id in ids:
                            done[output.request_id] = output
                            bar.update()
        finally:  # after an error or Ctrl-C nothing of this call stays queued
            for request_id in ids:
                self._core.abort(request_id)
        return [done[request_id] for request_id in ids]

    def _stream(self, token_ids: list[int], text: str | None, params: SamplingParams) -> Generator[RequestOutput, None, None]:
        request_id = str(next(self._ids))
        self._core.add_request(request_id, token_ids, params, text)
        try:
            finished = False
            while not finished:
                for output in self._core.step():
                    if output.request_id == request_id:
                        finished = output.finished
                        yield output
        finally:
            self._core.abort(request_id)

    def _tokenize(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, Mapping):
            if "prompt_token_ids" in prompt:
                return list(prompt["prompt_token_ids"])
            if isinstance(prompt.get("prompt"), str):
                return self.tokenizer.encode(prompt["prompt"])
            raise RequestError(f"a prompt that is a mapping needs 'prompt' or 'prompt_token_ids'; it has {sorted(map(str, prompt))}")
        return list(prompt)

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool, tools: Sequence[Mapping[str, Any]] | None) -> str:
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tools=tools)

    def _encode_chat(self, text: str) -> list[int]:
        """The template wrote the special tokens, the first of the sequence among them: so they are read as such, and none is added."""
        return self.tokenizer.encode(text, add_special=False, parse_special=True)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping):
        return [prompts]
    ids = [p for p in prompts if isinstance(p, int)]
    return [ids] if ids and len(ids) == len(prompts) else [p for p in prompts if not isinstance(p, int)]


def _text_of(prompt: Prompt) -> str | None:
    if isinstance(prompt, str):
        return prompt
    return prompt.get("prompt") if isinstance(prompt, Mapping) else None


def _progress_bar(total: int, use_tqdm: bool) -> Any:
    from tqdm import tqdm

    # disable=None: drawn on a terminal only
    return tqdm(total=total, unit="request", desc="generate", disable=None if use_tqdm else True)
