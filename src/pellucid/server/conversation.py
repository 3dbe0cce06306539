"""From a conversation to a stream of the engine, and from the engine's outputs to the parts of an
answer: reasoning, text and tool calls. All routes that chat share it.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from ..structured_params import StructuredOutputsParams
from .errors import ApiError
from .generation import Outputs, at_index_0, build_params, check_limits
from .harmony import HarmonyReader, is_harmony, with_thinking
from .protocol import ChatRequest
from .reasoning import ReasoningReader, opens_reasoning
from .service import Service, tenant_of
from .tool_calls import CallDelta, ToolCallReader, tool_grammar

__all__ = ["AnswerForm", "AnswerReader", "Change", "Part", "PartReader", "check_chat", "start_chat"]


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """How an answer is written."""

    names: list[str]  # of the tools that may be called
    is_harmony: bool = False


def start_chat(
    service: Service, body: ChatRequest, key: str
) -> tuple[Outputs, SamplingParams, AnswerForm]:
    """The engine's outputs for a conversation, how its tokens are drawn, and the form of the
    answer. Raises ApiError or PellucidError where the body is refused.
    """
    check_limits(body, service)
    check_chat(body, service)
    tools = [] if body.tool_choice == "none" else body.tools or []
    allowed = _allowed_tools(body, tools, service)
    given: dict[str, Any] = {}
    if body.logprobs:
        given["logprobs"] = body.top_logprobs or 0
    if body.max_completion_tokens is not None:
        given["max_tokens"] = body.max_completion_tokens
    elif body.max_tokens is None:
        given["max_tokens"] = None  # as many as the context holds
    if allowed is not None:
        if body.response_format is not None or body.structured_outputs is not None:
            raise ConfigError(
                "tool_choice forces a call, so no other form of the answer may be asked for"
            )
        grammar = tool_grammar(
            allowed,
            service.engine.tokenizer.chat_template,
            is_parallel=body.parallel_tool_calls is not False,
        )
        given["structured_outputs"] = StructuredOutputsParams(grammar=grammar)
    # Channels of harmony are special tokens.
    form = AnswerForm(
        [_name(tool) for tool in tools], is_harmony(service.engine.tokenizer.chat_template)
    )
    messages: list[Any] = body.messages
    if form.is_harmony:
        given["skip_special_tokens"] = False
        messages = [with_thinking(message) for message in messages]
    tenant = tenant_of(key)
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    params = build_params(body, service, **given)
    stream = service.engine.chat(
        messages,
        params,
        tools=tools or None,
        chat_template_kwargs=kwargs or None,
        add_generation_prompt=body.add_generation_prompt is not False
        and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        priority=body.priority or 0,
        tenant=tenant,
        cache_salt=body.cache_salt or tenant,
    )
    return at_index_0(stream), params, form


def check_chat(body: ChatRequest, service: Service) -> None:
    """Raise ApiError for messages, tools or logprobs that are not allowed."""
    settings = service.settings
    if body.chat_template is not None:
        raise ApiError(
            400,
            "chat_template is not taken from clients; the model's own template renders messages",
            param="chat_template",
        )
    for name, count, most in (
        ("messages", len(body.messages), settings.max_messages),
        ("tools", len(body.tools or ()), settings.max_tools),
    ):
        if count > most:
            raise ApiError(
                400, f"{name} is or has {count}; this server allows at most {most}", param=name
            )
    if body.top_logprobs is not None and not 0 <= body.top_logprobs <= settings.max_logprobs:
        raise ApiError(
            400,
            f"top_logprobs is {body.top_logprobs}; it must be between 0 and "
            f"{settings.max_logprobs}",
            param="top_logprobs",
        )
    if not body.messages:
        raise ApiError(400, "messages is empty; it must hold at least one", param="messages")
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
    for i, tool in enumerate(body.tools or ()):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, Mapping):
            raise ApiError(
                400,
                f"tools[{i}] must be an object with type 'function' and a function",
                param=f"tools[{i}]",
            )
        called = function.get("name")
        if not isinstance(called, str) or not 0 < len(called) <= 64 or not _is_plain(called):
            raise ApiError(
                400,
                f"tools[{i}].function.name must be 1 to 64 letters, digits, '_', '-' or '.'",
                param=f"tools[{i}].function.name",
            )
        if not isinstance(function.get("parameters", {}), Mapping):
            raise ApiError(
                400,
                f"tools[{i}].function.parameters must be a JSON Schema",
                param=f"tools[{i}].function.parameters",
            )


def _is_plain(name: str) -> bool:
    return name.isascii() and all(c.isalnum() or c in "_-." for c in name)


def _name(tool: Mapping[str, Any]) -> str:
    name: str = tool["function"]["name"]
    return name


def _allowed_tools(
    body: ChatRequest, tools: list[dict[str, Any]], service: Service
) -> list[dict[str, Any]] | None:
    """The functions one of which must be called; None where none must."""
    choice = body.tool_choice
    if choice in (None, "none", "auto"):
        return None
    if not tools:
        raise ApiError(400, "tool_choice needs tools", param="tool_choice")
    functions: list[dict[str, Any]] = [tool["function"] for tool in tools]
    if choice == "required":
        return functions
    named = choice.get("function") if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    found = [function for function in functions if function["name"] == name]
    if not found:
        names = ", ".join(function["name"] for function in functions)
        raise ApiError(
            400, f"tool_choice names no tool of the request; they are: {names}", param="tool_choice"
        )
    return found


class AnswerReader:
    """One completion as it grows: what was read of its text, and what was sent."""

    def __init__(self, output: RequestOutput, form: AnswerForm) -> None:
        self.num_chars = 0
        self.num_tokens = 0
        self.is_done = False
        self._reasoning = (
            HarmonyReader(form.names)
            if form.is_harmony
            else ReasoningReader(is_open=opens_reasoning(output.prompt))
        )
        self._calls = ToolCallReader(form.names, _new_call_id) if form.names else None

    @property
    def has_calls(self) -> bool:
        return self._calls is not None and self._calls.num_calls > 0

    def read(self, completion: CompletionOutput) -> tuple[str, list[str | CallDelta]]:
        """What is new of the reasoning, and of the answer in order."""
        new = completion.text[self.num_chars :]
        self.num_chars = len(completion.text)
        reasoning, answer = self._reasoning.push(new)
        if completion.finished():
            more, rest = self._reasoning.finish()
            reasoning, answer = reasoning + more, answer + rest
        if self._calls is None:
            return reasoning, [answer] if answer else []
        pieces = self._calls.push(answer)
        return reasoning, pieces + self._calls.finish() if completion.finished() else pieces


def _new_call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


@dataclass(slots=True)
class Part:
    """A part of an answer, which other APIs call an item or a block."""

    kind: Literal["reasoning", "text", "call"]
    index: int  # its place in the answer
    content: str = ""  # the text, or the call's arguments as JSON
    call_id: str = ""
    name: str = ""  # of the tool that is called


@dataclass(frozen=True, slots=True)
class Change:
    """What happened to a part: it began, it grew by `text`, or it is whole."""

    kind: Literal["open", "grow", "close"]
    part: Part
    text: str = ""


class PartReader:
    """Reads one completion as a list of parts that grows: only its last part is open."""

    def __init__(self, form: AnswerForm) -> None:
        self.parts: list[Part] = []
        self._form = form
        self._reader: AnswerReader | None = None
        self._open: Part | None = None

    @property
    def has_calls(self) -> bool:
        return any(part.kind == "call" for part in self.parts)

    def read(self, output: RequestOutput) -> list[Change]:
        """What is new in the output's first completion."""
        completion = output.outputs[0]
        if self._reader is None:
            self._reader = AnswerReader(output, self._form)
        if self._reader.is_done:
            return []
        changes: list[Change] = []
        reasoning, pieces = self._reader.read(completion)
        if reasoning:
            self._grow(changes, "reasoning", reasoning)
        for piece in pieces:
            if isinstance(piece, str):
                self._grow(changes, "text", piece)
            else:
                self._grow_call(changes, piece)
        if completion.finished():
            self._reader.is_done = True
            self._close(changes)
        return changes

    def _grow_call(self, changes: list[Change], piece: CallDelta) -> None:
        if piece.name is not None:  # a call begins
            self._close(changes)
            self._begin(changes, Part("call", len(self.parts), "", piece.id or "", piece.name))
        if piece.arguments:
            self._grow(changes, "call", piece.arguments)

    def _grow(
        self, changes: list[Change], kind: Literal["reasoning", "text", "call"], text: str
    ) -> None:
        if self._open is None or self._open.kind != kind:
            self._close(changes)
            self._begin(changes, Part(kind, len(self.parts)))
        assert self._open is not None
        self._open.content += text
        changes.append(Change("grow", self._open, text))

    def _begin(self, changes: list[Change], part: Part) -> None:
        self._open = part
        self.parts.append(part)
        changes.append(Change("open", part))

    def _close(self, changes: list[Change]) -> None:
        if self._open is not None:
            changes.append(Change("close", self._open))
            self._open = None
