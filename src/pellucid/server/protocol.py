"""The bodies that clients send: fields and types of OpenAI's API, and those that vLLM adds.

Types are strict: "0.7" is no number, 1 is no boolean, NaN and infinity are refused. Values are
checked where they are used (`SamplingParams`), so that a bound is written once. A field that nobody
knows is ignored, as other servers do, unless it is nearly the name of one that is known.
"""

import difflib
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    model_validator,
)

__all__ = [
    "SAMPLING_FIELDS",
    "ChatRequest",
    "CompletionRequest",
    "CountTokensRequest",
    "DetokenizeRequest",
    "EmbeddingRequest",
    "GenerationRequest",
    "MessagesRequest",
    "ResponsesRequest",
    "StreamOptions",
    "TokenizeRequest",
    "client_names",
]

JsonObject: TypeAlias = dict[str, JsonValue]

# A body of some megabytes holds millions of values, and each error costs microseconds. So the first
# error in a list ends its validation, and so does the first alternative that fits.
_Item = TypeVar("_Item")
Many: TypeAlias = Annotated[list[_Item], Field(fail_fast=True, max_length=1 << 20)]
Texts: TypeAlias = Annotated[str | Many[str], Field(union_mode="left_to_right")]
TextOrParts: TypeAlias = Annotated[str | Many[JsonObject], Field(union_mode="left_to_right")]
_MAX_PROMPTS, _MAX_TOKENS = 1 << 16, 1 << 20


def _check_prompts(value: Any) -> Any:
    """A union of lists would try each of its alternatives on all of a body. This reads each value
    once, and the lengths first.
    """
    if isinstance(value, str):
        return value
    kinds = set(map(type, value)) if isinstance(value, list) else {type(value)}
    if not isinstance(value, list) or len(kinds) > 1 or not kinds <= {str, int, list}:
        raise ValueError("it must be text, token ids, a list of texts, or a list of token ids")
    most = _MAX_TOKENS if kinds == {int} else _MAX_PROMPTS
    if len(value) > most:
        raise ValueError(f"it has {len(value)} entries; it must have at most {most}")
    if kinds == {list}:
        for i, token_ids in enumerate(value):
            if len(token_ids) > _MAX_TOKENS or not set(map(type, token_ids)) <= {int}:
                raise ValueError(f"entry {i} must hold at most {_MAX_TOKENS} token ids")
    return value


Prompts: TypeAlias = Annotated[
    str | list[str] | list[int] | list[list[int]],
    PlainValidator(
        _check_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


def _check_count(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > 4096:
        raise ValueError(f"it has {len(value)} entries; it must have at most 4096")
    return value


LogitBias: TypeAlias = Annotated[dict[str, float], BeforeValidator(_check_count)]

# fields of a request that are those of SamplingParams, by the same name
SAMPLING_FIELDS = (
    *("n", "temperature", "top_k", "top_p", "min_p", "typical_p", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "allowed_token_ids", "bad_words", "stop", "stop_token_ids"),
    *("include_stop_str_in_output", "ignore_eos", "max_tokens", "min_tokens"),
    *("prompt_logprobs", "truncate_prompt_tokens", "skip_special_tokens"),
)


_MAX_UNKNOWN = 64  # fields that are ignored


class _Body(BaseModel):
    """A body: strict, and open to fields that are not known."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="after")
    def _find_misspelled_fields(self) -> "_Body":
        known, unknown = type(self).model_fields, self.model_extra or {}
        if len(unknown) > _MAX_UNKNOWN:
            raise ValueError(f"{len(unknown)} fields are not known; at most {_MAX_UNKNOWN} may be")
        for name in unknown:
            near = difflib.get_close_matches(name[:64], known, n=1, cutoff=0.85)
            if near:
                raise ValueError(f"there is no field {name[:64]!r}; did you mean {near[0]!r}?")
        return self


class StreamOptions(_Body):
    """What a stream tells beside the answer."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_explanation: bool | None = None  # in the timings: what bound the answer


class GenerationRequest(_Body):
    """What all requests for text have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # sampling
    n: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    allowed_token_ids: Many[int] | None = None
    bad_words: Many[str] | None = None
    # ends
    stop: Texts | None = None
    stop_token_ids: Many[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    # form
    response_format: JsonObject | None = None
    structured_outputs: JsonObject | None = None
    # prompt and output
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    # how it is treated among others
    priority: int | None = None
    cache_salt: str | None = None
    # accepted, and without effect
    user: str | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompts
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: int | None = None


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Many[JsonObject]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    tools: Many[JsonObject] | None = None
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: JsonObject | None = None


class EmbeddingRequest(_Body):
    """POST /v1/embeddings."""

    model: str | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    # what PoolingParams has beside `dimensions`
    pooling: str | None = None
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None
    # how it is treated among others
    priority: int | None = None
    cache_salt: str | None = None
    # accepted, and without effect
    user: str | None = None


class _TranslatedRequest(_Body):
    """What requests of other APIs have in common, beside what they call by other names. The last
    group is ours.
    """

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Many[JsonObject] | None = None
    metadata: JsonObject | None = None
    service_tier: str | None = None  # accepted, and without effect
    # beyond the API
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    chat_template_kwargs: JsonObject | None = None


class ResponsesRequest(_TranslatedRequest):
    """POST /v1/responses."""

    input: TextOrParts
    instructions: str | None = None
    max_output_tokens: int | None = None
    text: JsonObject | None = None
    tool_choice: Literal["none", "auto", "required"] | JsonObject | None = None
    parallel_tool_calls: bool | None = None
    reasoning: JsonObject | None = None
    include: Many[str] | None = None
    truncation: str | None = None
    # what would need answers to be kept, or to go on without a client
    store: bool | None = None
    previous_response_id: str | None = None
    conversation: str | JsonObject | None = None
    background: bool | None = None
    prompt: JsonObject | None = None
    # accepted, and without effect
    stream_options: JsonObject | None = None
    user: str | None = None


class _AnthropicRequest(_TranslatedRequest):
    """What the two routes of Anthropic's API have in common."""

    messages: Many[JsonObject]
    system: TextOrParts | None = None
    tool_choice: JsonObject | None = None
    thinking: JsonObject | None = None


class MessagesRequest(_AnthropicRequest):
    """POST /v1/messages."""

    max_tokens: int
    stop_sequences: Many[str] | None = None


class CountTokensRequest(_AnthropicRequest):
    """POST /v1/messages/count_tokens."""


class TokenizeRequest(_Body):
    """POST /tokenize: a text, or a chat."""

    model: str | None = None
    prompt: str | None = None
    messages: Many[JsonObject] | None = None
    tools: Many[JsonObject] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: JsonObject | None = None


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Many[int]


def client_names(body: BaseModel) -> dict[str, str]:
    """The fields of a body that an error may name. Some of the engine's are made from others: those
    have the name of the field that the client set.
    """
    names = {name: name for name in type(body).model_fields}
    if isinstance(body, GenerationRequest) and body.response_format is not None:
        names["structured_outputs"] = "response_format"
    if isinstance(body, ChatRequest):
        if body.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if body.tools and body.tool_choice not in (None, "none", "auto"):
            names["structured_outputs"] = "tools"
    return names
