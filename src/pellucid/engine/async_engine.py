"""`AsyncEngine`: many requests at once from asyncio, over one core that runs in a thread of its
own.

    async with AsyncEngine.load("smollm2-135m-instruct") as engine:
        async for output in engine.generate("The capital of France is",
        SamplingParams(max_tokens=16)):
            print(output.outputs[0].text)

A request is an async iterator. Each of its operations (begin, wait for the next output, leave) is
passed on to `core_thread`, where the core runs. Prompts are tokenized, chats are rendered and
grammars are compiled in threads of asyncio's pool. So none of this blocks the event loop.

The thread ends when the engine is closed or garbage-collected. So it holds no reference to the
engine.
"""

import asyncio
import functools
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any

from ..engine_config import EngineConfig
from ..outputs import RequestMetrics, RequestOutput
from ..pooling_params import PoolingParams
from ..sampling_params import SamplingParams, listed_params, params_for_prompts
from ..structured import GrammarCompiler
from .admission import Submission, tokenize_bad_words
from .core_thread import CoreThread
from .loader import Engine, load_engine
from .pooling import check_lengths, resolve_pooling
from .prompts import (
    Message,
    Prompt,
    TokenizedPrompt,
    longest_prompt,
    tokenize_chat,
    tokenize_prompt,
    tokenize_prompts,
    with_priorities,
    with_standing,
)
from .stats import EngineStats, RequestStats, list_requests
from .task_mailbox import TaskMailbox

__all__ = ["AsyncEngine"]


class AsyncEngine:
    """A loaded model that serves any number of tasks. Close it, or use it as an async context
    manager.
    """

    def __init__(self, engine: Engine) -> None:
        """Take over the engine: no other code may call its core."""
        self.path = engine.path
        self.model_config = engine.model_config
        self.tokenizer = engine.tokenizer
        self.generation_config = engine.generation_config
        self._pooling = engine.pooling
        # the longest prompt and output together, in tokens
        self.max_model_len = engine.core.scheduler.max_model_len
        self._grammars = GrammarCompiler(engine.tokenizer)
        self._explain = engine.core.explain
        self._thread = CoreThread(engine.core)
        weakref.finalize(self, self._thread.stop)  # also when the interpreter ends

    @classmethod
    def load(
        cls,
        model: str | Path,
        config: EngineConfig | None = None,
        *,
        cache_dir: Path | None = None,
        progress: bool = False,
    ) -> "AsyncEngine":
        """Load a model as `LLM` does. It blocks for seconds: call it before the event loop runs, or
        in a thread.
        """
        return cls(
            load_engine(model, config or EngineConfig(), cache_dir=cache_dir, progress=progress)
        )

    async def prepare_explanations(self) -> None:
        """Load what explains the times of requests, in a thread. Without this the first explanation
        does it, where it is asked for, and takes 80 ms.
        """
        if self._explain is not None:
            await asyncio.to_thread(self._explain, RequestMetrics(arrival_time=0.0))

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int | None = None,
        parse_special: bool = True,
        truncate_prompt_tokens: int | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a prompt, yielding the answer so far. The last output is `finished`.

        The request is submitted at the first `anext`, which raises RequestError, ConfigError or
        QueueFullError if it is refused. Leaving the iterator, or cancelling the task, aborts the
        request before the next step.
        """

        def tokenize() -> TokenizedPrompt:
            tokenized = tokenize_prompt(
                self.tokenizer,
                prompt,
                parse_special=parse_special,
                truncate_prompt_tokens=truncate_prompt_tokens,
                max_tokens=longest_prompt(self.max_model_len, sampling_params),
            )
            (tokenized,) = with_priorities([tokenized], priority)
            return tokenized

        return self._stream(tokenize, sampling_params, request_id)

    async def generate_all(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | None = None
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """Complete several prompts, yielding the index of a prompt and its answer so far.

        All prompts are submitted together at the first `anext`: it raises if one is refused, and
        then none runs. Leaving the iterator aborts them all.
        """
        (params,) = params_for_prompts(sampling_params or self.get_default_sampling_params(), 1)

        def tokenize() -> list[TokenizedPrompt]:
            longest = longest_prompt(self.max_model_len, params)
            return tokenize_prompts(self.tokenizer, prompts, max_tokens=longest)

        index_of = {self._thread.new_id(): i for i in range(len(prompts))}
        async with aclosing(self._outputs(tokenize, params, list(index_of))) as outputs:
            async for output in outputs:
                yield index_of[output.request_id], output

    async def embed(
        self, prompts: Sequence[Prompt], pooling_params: PoolingParams | None = None
    ) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """The embeddings of several prompts, yielding the index of a prompt and its `PooledOutput`
        when it is finished. Prompts are submitted and aborted as by `generate_all`.
        """
        (params,) = listed_params("pooling_params", pooling_params, 1, PoolingParams)
        params = resolve_pooling(params, self._pooling)

        def tokenize() -> list[TokenizedPrompt]:
            longest = longest_prompt(self.max_model_len, params)
            tokenized = tokenize_prompts(self.tokenizer, prompts, max_tokens=longest)
            check_lengths(tokenized, longest)
            return tokenized

        index_of = {self._thread.new_id(): i for i in range(len(prompts))}
        async with aclosing(self._outputs(tokenize, params, list(index_of))) as outputs:
            async for output in outputs:
                if output.finished:
                    yield index_of[output.request_id], output

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        priority: int = 0,
        tenant: str = "",
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation, rendered as in `LLM.chat`, yielded as in `generate`. The last
        three are those of a prompt (`TextPrompt`).
        """
        render = functools.partial(
            tokenize_chat,
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            continue_final_message=continue_final_message,
            max_tokens=longest_prompt(self.max_model_len, sampling_params),
        )

        def tokenize() -> TokenizedPrompt:
            return with_standing(render(), priority, tenant, cache_salt)

        return self._stream(tokenize, sampling_params, request_id)

    def abort(self, request_id: str) -> None:
        """End a request before the next step: its stream yields the answer so far, with the
        finish_reason "abort". Unknown ids are ignored.
        """
        self._thread.abort(request_id)

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's authors recommend, or else the defaults, as in `LLM`."""
        return SamplingParams(**self.generation_config)  # type: ignore[arg-type]

    def stats(self) -> EngineStats:
        """The state of the engine after its last step, and its counts since it was loaded."""
        return self._thread.stats

    async def requests(self) -> list[RequestStats]:
        """The requests that run or wait, as between two steps."""
        return await asyncio.to_thread(
            self._thread.call, lambda core: list_requests(core.scheduler)
        )

    @property
    def is_dead(self) -> bool:
        """True once it was closed, or ended by a crash."""
        return self._thread.is_dead

    async def close(self) -> None:
        """Stop after the current step. Open streams raise EngineDeadError, and so does every later
        call.
        """
        await asyncio.to_thread(self._thread.stop)

    async def __aenter__(self) -> "AsyncEngine":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _stream(
        self,
        tokenize: Callable[[], TokenizedPrompt],
        params: SamplingParams | None,
        request_id: str | None,
    ) -> AsyncGenerator[RequestOutput, None]:
        (params,) = params_for_prompts(params or self.get_default_sampling_params(), 1)
        name = self._thread.new_id() if request_id is None else request_id
        return self._outputs(lambda: [tokenize()], params, [name])

    async def _outputs(
        self,
        tokenize: Callable[[], list[TokenizedPrompt]],
        params: SamplingParams | PoolingParams,
        request_ids: Sequence[str],
    ) -> AsyncGenerator[RequestOutput, None]:
        """The outputs of one submission: a request for each prompt."""

        def submissions() -> list[Submission]:
            prompts, constraint = tokenize(), None
            banned: tuple[tuple[int, ...], ...] = ()
            if isinstance(params, SamplingParams):
                constraint = self._grammars.constraint(params)
                banned = tokenize_bad_words(params, self.tokenizer)
            several = len(prompts) > 1
            return [
                Submission(
                    name, prompt, params, constraint, banned, f"prompts[{i}]" if several else ""
                )
                for i, (name, prompt) in enumerate(zip(request_ids, prompts, strict=True))
            ]

        box = TaskMailbox(await asyncio.to_thread(submissions), asyncio.get_running_loop())
        try:
            self._thread.submit(box)
            num_left = len(request_ids)
            while num_left:
                await box.event.wait()
                for output in self._thread.take(box):
                    num_left -= output.finished
                    yield output
        finally:
            self._thread.leave(box)
