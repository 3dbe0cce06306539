"""POST /v1/completions: texts that go on with given ones."""

from typing import Any

from starlette.responses import Response

from ..outputs import CompletionOutput, RequestOutput
from .errors import ApiError
from .generation import Job, build_params, check_limits, timings, usage
from .logprobs import prompt_logprobs, text_logprobs
from .protocol import CompletionRequest
from .service import Service, tenant_of
from .streaming import GeneratedResponse, event

__all__ = ["complete"]

Prompts = list[str] | list[list[int]]


def complete(service: Service, body: CompletionRequest, key: str) -> Response:
    """The response to a checked body. Raises ApiError or PellucidError where it is refused."""
    check_limits(body, service)
    prompts, n = _prompts(body, service), body.n or 1
    if body.suffix:
        raise ApiError(
            400,
            "suffix is not supported: put the model's own fill-in-the-middle tokens into prompt",
            param="suffix",
        )
    if body.best_of not in (None, 1, n):
        raise ApiError(400, "best_of is not supported; it must equal n", param="best_of")
    if body.logprobs is not None and not 0 <= body.logprobs <= service.settings.max_logprobs:
        most = service.settings.max_logprobs
        raise ApiError(
            400, f"logprobs is {body.logprobs}; it must be between 0 and {most}", param="logprobs"
        )
    # An echo without new tokens still needs one step, whose token is dropped.
    scores_prompt = bool(body.echo) and body.logprobs is not None
    is_prompt_only = bool(body.echo) and body.max_tokens == 0
    given: dict[str, Any] = {"logprobs": body.logprobs}
    if is_prompt_only:
        given["max_tokens"] = 1
    if scores_prompt:
        given["prompt_logprobs"] = max(body.logprobs or 0, body.prompt_logprobs or 0)
    params = build_params(body, service, **given)
    tenant = tenant_of(key)
    standing: dict[str, Any] = {"tenant": tenant, "cache_salt": body.cache_salt or tenant}
    if body.priority is not None:
        standing["priority"] = body.priority
    outputs = service.engine.generate_all(
        [
            ({"prompt": p} if isinstance(p, str) else {"prompt_token_ids": p}) | standing
            for p in prompts
        ],
        params,
    )
    job = Job.build("cmpl-", body, params, key, outputs)
    return GeneratedResponse(service, job, _Renderer(service, job, body, is_prompt_only))


def _prompts(body: CompletionRequest, service: Service) -> Prompts:
    """The prompts as a list; ApiError where there are none, or too many."""
    prompt, settings = body.prompt, service.settings
    prompts: Any = prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        prompts = [prompt]
    if not prompts or not all(prompts):
        raise ApiError(400, "prompt is empty; it must hold text or token ids", param="prompt")
    if len(prompts) > settings.max_prompts:
        raise ApiError(
            400,
            f"prompt has {len(prompts)} entries; this server allows {settings.max_prompts}",
            param="prompt",
        )
    if len(prompts) * (body.n or 1) > settings.max_completions:
        raise ApiError(
            400,
            f"{len(prompts)} prompts with n {body.n} ask for {len(prompts) * (body.n or 1)} "
            f"answers; this server allows {settings.max_completions}",
            param="n",
        )
    found: Prompts = prompts
    return found


class _Renderer:
    """Bodies of text completions."""

    def __init__(
        self, service: Service, job: Job, body: CompletionRequest, is_prompt_only: bool
    ) -> None:
        self._service = service
        self._job = job
        self._body = body
        self._is_prompt_only = is_prompt_only
        # of each completion, by its index in the response: characters and tokens that were sent
        self._sent: dict[int, tuple[int, int]] = {}
        self._offsets: dict[int, int] = {}  # characters of the tokens whose logprobs were sent
        self._head = {
            "id": job.id,
            "object": "text_completion",
            "created": job.created,
            "model": service.name,
        }

    def begin(self) -> bytes:
        return b""

    def push(self, place: int, output: RequestOutput) -> bytes:
        return b"".join(self._chunk(place, output, c) for c in output.outputs)

    def _chunk(self, place: int, output: RequestOutput, completion: CompletionOutput) -> bytes:
        index = place * self._job.n + completion.index
        num_chars, num_tokens = self._sent.get(index, (0, 0))
        is_first = index not in self._sent
        is_done = (num_chars, num_tokens) == (-1, -1)
        text, token_ids = completion.text[num_chars:], completion.token_ids[num_tokens:]
        if is_done or not (text or completion.finished() or (token_ids and self._tells_tokens)):
            return b""
        choice = self._choice(output, completion, index, num_chars, num_tokens, is_first)
        self._sent[index] = (
            (-1, -1) if completion.finished() else (len(completion.text), completion.num_tokens)
        )
        is_last = all(
            self._sent.get(place * self._job.n + c.index) == (-1, -1) for c in output.outputs
        )
        beside = self._job.beside_choice(output, completion, is_last=is_last)
        return event(self._head | {"choices": [choice]} | beside)

    @property
    def _tells_tokens(self) -> bool:
        return self._body.logprobs is not None or bool(self._body.return_token_ids)

    def _choice(
        self,
        output: RequestOutput,
        completion: CompletionOutput,
        index: int,
        num_chars: int,
        num_tokens: int,
        is_first: bool,
    ) -> dict[str, Any]:
        """A completion from `num_chars` and `num_tokens` on; the first part has the echo."""
        echo = self._echo(output) if self._body.echo and is_first else ""
        text = "" if self._is_prompt_only else completion.text[num_chars:]
        choice: dict[str, Any] = {
            "index": index,
            "text": echo + text,
            "logprobs": None,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if self._body.logprobs is not None and completion.logprobs is not None:
            stop = len(completion.logprobs)
            token_ids = completion.token_ids[num_tokens:stop]
            rows: list[Any] = completion.logprobs[num_tokens:stop]
            if self._is_prompt_only:
                token_ids, rows = [], []
            first = ""
            if self._body.echo and is_first:
                token_ids = output.prompt_token_ids + token_ids
                rows = list(output.prompt_logprobs or [None]) + rows
                first = self._service.engine.tokenizer.token_text(token_ids[0])
            # the texts of tokens, not the text that was sent: some of that may be held back
            offset = self._offsets.get(index, 0)
            told = text_logprobs(token_ids, rows, self._body.logprobs, offset, first)
            self._offsets[index] = offset + sum(map(len, told["tokens"]))
            choice["logprobs"] = told
        if self._body.return_token_ids:
            choice["token_ids"] = [] if self._is_prompt_only else completion.token_ids[num_tokens:]
            if is_first:
                choice["prompt_token_ids"] = output.prompt_token_ids
        if is_first and self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return choice

    def _echo(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return self._service.engine.tokenizer.decode(output.prompt_token_ids, skip_special=False)

    def end(self, outputs: list[RequestOutput]) -> bytes:
        last = b""
        if self._job.includes_usage:
            times = timings(outputs[0], is_explained=self._job.includes_explanation)
            told = {"choices": [], "usage": self._usage(outputs), "timings": times}
            last = event(self._head | told)
        return last + b"data: [DONE]\n\n"

    def _usage(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        told = usage(outputs)
        if self._is_prompt_only:
            told |= {"completion_tokens": 0, "total_tokens": told["prompt_tokens"]}
        return told

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        choices = [
            self._choice(output, c, place * self._job.n + c.index, 0, 0, True)
            for place, output in enumerate(outputs)
            for c in output.outputs
        ]
        told = {"choices": choices, "usage": self._usage(outputs)}
        if len(outputs) == 1:
            told["timings"] = timings(outputs[0])
        return self._head | told
