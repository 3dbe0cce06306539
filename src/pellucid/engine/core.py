"""The only loop: a step is schedule → execute → update, and what it gave is handed out.

One idea: the core owns every request from `add_request` to its last output, and is driven by calls
to `step()`; whoever calls it (an offline `LLM`, a server's thread) decides about threads and
waiting. It knows text only through the detokenizer, because a stop string ends a request.
"""

import random
import time
from dataclasses import replace

from ..config import ModelConfig
from ..errors import EngineError, RequestError
from ..request import Request, RequestOutput, SamplingParams
from ..sampling import check_token_ids
from ..scheduler import ScheduledStep, Scheduler
from ..tokenizer import Tokenizer
from .model_runner import ModelRunner, StepResult
from .output import OutputGroup
from .prompts import TokenizedPrompt

__all__ = ["EngineCore"]


class EngineCore:
    """Runs requests to their ends. Not thread-safe: one caller at a time."""

    def __init__(
        self,
        model: ModelConfig,
        tokenizer: Tokenizer,
        scheduler: Scheduler,
        runner: ModelRunner,
        *,
        seed: int,
    ) -> None:
        self.scheduler = scheduler
        self._model = model
        self._tokenizer = tokenizer
        self._runner = runner
        self._seeds = random.Random(seed)  # for requests that bring none
        # what was asked, by its id: one group has n requests
        self._groups: dict[str, OutputGroup] = {}
        self._group_of: dict[str, OutputGroup] = {}  # the same, by the id of each of its requests

    @property
    def has_unfinished(self) -> bool:
        return self.scheduler.num_unfinished > 0

    def add_request(self, request_id: str, prompt: TokenizedPrompt, params: SamplingParams) -> None:
        """Queue `params.n` completions of a prompt.

        Raises RequestError, ConfigError or QueueFullError, and queues nothing, where they cannot be
        served.
        """
        names = [request_id if params.n == 1 else f"{request_id}-{i}" for i in range(params.n)]
        if request_id in self._groups or any(name in self._group_of for name in names):
            raise RequestError(f"request_id {request_id!r} is in use")
        tokens = prompt.token_ids
        for token_id in tokens:
            if not 0 <= token_id < self._model.vocab_size:
                raise RequestError(
                    f"prompt token id {token_id} is outside the vocabulary of "
                    f"{self._model.vocab_size}"
                )
        check_token_ids(params, self._model.vocab_size)
        seed = params.seed if params.seed is not None else self._seeds.getrandbits(63)
        room = self.scheduler.max_model_len - len(tokens)
        banned = tuple(self._banned_sequences(params))
        requests = [
            Request(
                request_id=name,
                prompt_token_ids=tokens,
                # the prompt is scored once
                params=params if i == 0 else replace(params, prompt_logprobs=None),
                seed=(seed + i) & 0xFFFFFFFFFFFFFFFF,
                eos_token_ids=self._tokenizer.eos_token_ids,
                banned_sequences=banned,
                max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
                priority=prompt.priority,
                tenant=prompt.tenant,
                cache_salt=prompt.cache_salt,
                prompt_logprobs=[None] if params.prompt_logprobs is not None and i == 0 else [],
            )
            for i, name in enumerate(names)
        ]
        self.scheduler.add(*requests)
        group = OutputGroup(request_id, prompt.text, requests, self._tokenizer, time.monotonic())
        self._groups[request_id] = group
        self._group_of.update((request.request_id, group) for request in requests)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End what was asked under this id, free what it holds, and give its last output. An
        unknown or finished id is left alone.
        """
        group = self._groups.get(request_id)
        if group is None:
            return None
        now = time.monotonic()
        for request in group.requests:
            self.scheduler.finish(request, "abort")
            group.finish(request, now)
        return self._output(group)

    def step(self) -> list[RequestOutput]:
        """Run one step; the outputs of the requests that it brought forward, as far as they have
        come.

        Raises EngineError where it crashed: the requests that it computed are then gone, and the
        others can go on.
        """
        step = self.scheduler.schedule()
        if not step.requests:
            return []
        try:
            result = self._runner.execute(step)
        except Exception as error:
            raise self._fail(step, error) from error
        for request_id, refusal in result.errors.items():
            request = self._group_of[request_id].request(request_id)
            request.stop_reason = str(refusal)
            result.sampled.pop(request_id, None)
            self.scheduler.finish(request, "error")
        self.scheduler.update(step, result.sampled)
        now = time.monotonic()
        touched = {
            id(group): group for r in step.requests for group in [self._advance(r, result, now)]
        }
        return [self._output(group) for group in touched.values()]

    def _fail(self, step: ScheduledStep, error: Exception) -> EngineError:
        """Nobody knows how far a crashed step came: its requests end, and no prefix is trusted any
        longer.
        """
        failed = list(dict.fromkeys(self._group_of[r.request_id].request_id for r in step.requests))
        for request_id in failed:
            for request in self._groups[request_id].requests:
                self.scheduler.finish(request, "error")
            self._forget(self._groups[request_id])
        self.scheduler.kv.forget()
        return EngineError(
            f"a step of the engine crashed ({type(error).__name__}: {error}); the requests that "
            "it computed are lost",
            failed,
        )

    def _advance(self, request: Request, result: StepResult, now: float) -> OutputGroup:
        group = self._group_of[request.request_id]
        request.prompt_logprobs += [
            group.named(row) for row in result.prompt_logprobs.get(request.request_id, [])
        ]
        if request.request_id in result.logprobs:
            request.logprobs.append(group.named(result.logprobs[request.request_id]))
        if (
            group.advance(request, result.sampled.get(request.request_id), now)
            and not request.is_finished
        ):
            self.scheduler.finish(request, "stop")  # the text holds a stop string
        if request.is_finished:
            group.finish(request, now)
        return group

    def _output(self, group: OutputGroup) -> RequestOutput:
        output = group.output()
        if output.finished:
            self._forget(group)
        return output

    def _forget(self, group: OutputGroup) -> None:
        self._groups.pop(group.request_id, None)
        for request in group.requests:
            self._group_of.pop(request.request_id, None)

    def _banned_sequences(self, params: SamplingParams) -> list[tuple[int, ...]]:
        """Token sequences that spell a bad word, at the beginning of the text or after a space."""
        return sorted(
            {
                ids
                for word in params.bad_words or ()
                for text in (word, " " + word.lstrip())
                if (ids := tuple(self._tokenizer.encode(text, add_special=False)))
            }
        )
