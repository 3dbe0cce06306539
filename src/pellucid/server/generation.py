"""From a checked body to outputs of the engine, for all routes that generate."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..errors import ConfigError
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from ..structured_params import StructuredOutputsParams, check_schema_depth
from .errors import ApiError
from .protocol import SAMPLING_FIELDS, ChatRequest, GenerationRequest, client_names
from .service import Service

__all__ = ["Job", "Outputs", "at_index_0", "build_params", "check_limits", "timings", "usage"]

# the index of a prompt, and its answer so far
Outputs: TypeAlias = AsyncGenerator[tuple[int, RequestOutput], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that is ready to run: the stream of its outputs."""

    id: str
    outputs: Outputs
    n: int  # completions of each prompt
    params: SamplingParams | None = None  # None: an embedding
    is_stream: bool
    includes_usage: bool
    includes_explanation: bool
    key: str  # the client's API key, or empty
    body_fields: Mapping[str, str]  # that an error may name, with the client's names for them
    max_tokens: int | None = None  # of a completion, where the client said so
    has_usage_in_chunks: bool = False  # of what was made so far
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def build(
        cls,
        prefix: str,
        body: GenerationRequest,
        params: SamplingParams,
        key: str,
        outputs: Outputs,
    ) -> "Job":
        """`prefix` begins the id: "chatcmpl-", "resp_"."""
        options, max_tokens = body.stream_options, body.max_tokens
        if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
            max_tokens = body.max_completion_tokens
        return cls(
            id=prefix + uuid.uuid4().hex,
            outputs=outputs,
            n=params.n,
            params=params,
            max_tokens=max_tokens,
            is_stream=bool(body.stream),
            includes_usage=options is not None and bool(options.include_usage),
            includes_explanation=options is not None and bool(options.include_explanation),
            has_usage_in_chunks=options is not None and bool(options.continuous_usage_stats),
            key=key,
            body_fields=client_names(body),
        )

    def beside_choice(
        self, output: RequestOutput, completion: CompletionOutput, *, is_last: bool
    ) -> dict[str, Any]:
        """What a chunk of a stream holds beside its choice. Timings come with the last chunk, as
        llama-server sends them; in a stream that ends with usage they come with that.
        """
        if not self.includes_usage:
            if not is_last:
                return {}
            return {"timings": timings(output, is_explained=self.includes_explanation)}
        if not self.has_usage_in_chunks:
            return {"usage": None}
        prompt, made = len(output.prompt_token_ids), completion.num_tokens
        told = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
        return {"usage": told}


def check_limits(body: GenerationRequest, service: Service) -> None:
    """Raise ApiError for a body that asks for more than the settings allow."""
    settings = service.settings
    service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    stops = body.stop if isinstance(body.stop, list) else []
    for name, count, most in (
        ("stop", len(stops), settings.max_stop),
        ("logit_bias", len(body.logit_bias or ()), settings.max_logit_bias),
        ("n", body.n or 1, settings.max_completions),
        ("prompt_logprobs", body.prompt_logprobs or 0, settings.max_logprobs),
    ):
        if count > most:
            raise ApiError(
                400, f"{name} is or has {count}; this server allows at most {most}", param=name
            )
    if body.prompt_logprobs == -1:
        raise ApiError(400, "prompt_logprobs is -1; it must be at least 0", param="prompt_logprobs")


def build_params(body: GenerationRequest, service: Service, **given: Any) -> SamplingParams:
    """What the body asks for, over the model's own defaults. `given` overrides both. Raises
    ConfigError with the field's name.
    """
    fields: dict[str, Any] = dict(service.engine.generation_config)
    for name in SAMPLING_FIELDS:
        value = getattr(body, name)
        if value is not None:
            fields[name] = value
    fields["structured_outputs"] = _constraint(body)
    params = SamplingParams.from_optional(**{**fields, **given})
    if params.structured_outputs is not None:
        _check_schema(body, params.structured_outputs, service)
    return params


def _check_schema(
    body: GenerationRequest, constraint: StructuredOutputsParams, service: Service
) -> None:
    """Raise ApiError for a form of the answer that is larger or deeper than the settings allow."""
    settings = service.settings
    field = next(
        (f for f in ("response_format", "structured_outputs") if getattr(body, f)), "tools"
    )
    kind, text = constraint.kind_and_text()
    if len(text) > settings.max_schema:
        raise ApiError(
            400,
            f"{field} has {len(text)} characters as a {kind}; this server allows at most "
            f"{settings.max_schema}",
            param=field,
        )
    schemas = [json.loads(text)] if kind == "json" else []
    if field == "tools" and isinstance(body, ChatRequest):
        schemas += [tool.get("function") for tool in body.tools or ()]
    for schema in schemas:
        try:
            check_schema_depth(schema, settings.max_schema_depth, field)
        except ConfigError as error:
            raise ApiError(400, str(error), param=field) from None


def _constraint(body: GenerationRequest) -> StructuredOutputsParams | None:
    """The form that the answer must have, if any."""
    if body.response_format is not None:
        if body.structured_outputs is not None:
            raise ConfigError("response_format and structured_outputs exclude each other")
        return StructuredOutputsParams.from_response_format(body.response_format)
    if body.structured_outputs is None:
        return None
    try:
        return StructuredOutputsParams.from_optional(**body.structured_outputs)
    except ConfigError as error:
        raise ApiError(400, str(error), param="structured_outputs") from None


async def at_index_0(stream: AsyncGenerator[RequestOutput, None]) -> Outputs:
    """The outputs of a route that has one prompt."""
    async with aclosing(stream):
        async for output in stream:
            yield 0, output


def usage(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    """OpenAI's usage of a request with one or more prompts."""
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    completion = sum(c.num_tokens for output in outputs for c in output.outputs)
    cached = sum(output.num_cached_tokens for output in outputs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(output: RequestOutput, *, is_explained: bool = False) -> dict[str, Any]:
    """Where the time of a request went, with llama-server's names; times in milliseconds.

    `is_explained` adds what bound the answer: `bound`, `share_of_ceiling` and `explanation`. That
    takes 0.3 ms.
    """
    times = output.metrics
    num_prompt = len(output.prompt_token_ids) - output.num_cached_tokens
    num_output = sum(c.num_tokens for c in output.outputs)
    queue, prefill, decode = times.time_in_queue, times.time_in_prefill, times.time_in_decode
    found: dict[str, Any] = {"cache_n": output.num_cached_tokens}
    if queue is not None:
        found["queue_ms"] = round(1e3 * queue, 3)
    for name, count, seconds in (
        ("prompt", num_prompt, prefill),
        ("predicted", num_output, decode),
    ):
        found[f"{name}_n"] = count
        if seconds is not None:
            # the first token comes with prefill
            steps = count if name == "prompt" else count - len(output.outputs)
            found[f"{name}_ms"] = round(1e3 * seconds, 3)
            found[f"{name}_per_token_ms"] = round(1e3 * seconds / max(1, steps), 3)
            found[f"{name}_per_second"] = round(steps / seconds, 3) if seconds > 0 else 0.0
    if output.speculation is not None:
        found["draft_n"] = output.speculation.num_draft_tokens
        found["draft_n_accepted"] = output.speculation.num_accepted_tokens
    if is_explained:
        told = times.explain()
        found["bound"] = told.bound
        found["share_of_ceiling"] = told.share_of_ceiling
        found["explanation"] = told.sentence
    return found
