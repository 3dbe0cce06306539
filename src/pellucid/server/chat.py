"""POST /v1/chat/completions: the next message of a conversation, with reasoning and tool calls."""

import uuid
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..errors import ConfigError
from ..outputs import CompletionOutput, RequestOutput
from ..structured_params import StructuredOutputsParams
from .errors import ApiError
from .generation import Job, at_index_0, build_params, check_limits, timings, usage
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatRequest
from .reasoning import ReasoningReader, opens_reasoning
from .service import Service, tenant_of
from .streaming import GeneratedResponse, event
from .tool_calls import CallDelta, ToolCallReader, tool_grammar

__all__ = ["chat"]


def chat(service: Service, body: ChatRequest, key: str) -> Response:
    """The response to a checked body. Raises ApiError or PellucidError where it is refused."""
    check_limits(body, service)
    _check_chat(body, service)
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
                "tool_choice forces a call, so response_format and structured_outputs must be "
                "absent"
            )
        grammar = tool_grammar(
            allowed,
            service.engine.tokenizer.chat_template,
            is_parallel=body.parallel_tool_calls is not False,
        )
        given["structured_outputs"] = StructuredOutputsParams(grammar=grammar)
    tenant = tenant_of(key)
    kwargs: dict[str, Any] = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    stream = service.engine.chat(
        body.messages,
        build_params(body, service, **given),
        tools=tools or None,
        chat_template_kwargs=kwargs or None,
        add_generation_prompt=body.add_generation_prompt is not False
        and not body.continue_final_message,
        continue_final_message=bool(body.continue_final_message),
        priority=body.priority or 0,
        tenant=tenant,
        cache_salt=body.cache_salt or tenant,
    )
    job = Job.build("chatcmpl", body, body.n or 1, key, at_index_0(stream))
    renderer = _Renderer(service, job, body, [_name(t) for t in tools])
    return GeneratedResponse(service, job, renderer)


def _check_chat(body: ChatRequest, service: Service) -> None:
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


class _Choice:
    """One completion as it grows: what was read of its text, and what was sent."""

    def __init__(self, output: RequestOutput, names: list[str]) -> None:
        self.num_chars = 0
        self.num_tokens = 0
        self.is_done = False
        self._reasoning = ReasoningReader(is_open=opens_reasoning(output.prompt))
        self._calls = ToolCallReader(names, _new_call_id) if names else None

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


class _Renderer:
    """Bodies of chat completions."""

    def __init__(self, service: Service, job: Job, body: ChatRequest, names: list[str]) -> None:
        self._job = job
        self._body = body
        self._names = names
        self._choices: dict[int, _Choice] = {}
        self._head = {"id": job.id, "created": job.created, "model": service.name}
        self._usage: dict[str, Any] = {"usage": None} if job.includes_usage else {}

    def begin(self) -> bytes:
        role = {"role": "assistant", "content": ""}
        return b"".join(
            self._event({"index": i, "delta": role, "logprobs": None, "finish_reason": None})
            for i in range(self._job.n)
        )

    def push(self, place: int, output: RequestOutput) -> bytes:
        return b"".join(self._chunks(output, completion) for completion in output.outputs)

    def _chunks(self, output: RequestOutput, completion: CompletionOutput) -> bytes:
        """The events of what is new in one completion."""
        state = self._state(output, completion)
        if state.is_done:
            return b""
        first, state.num_tokens = state.num_tokens, len(completion.token_ids)
        reasoning, pieces = state.read(completion)
        deltas: list[dict[str, Any]] = []
        if reasoning and self._body.include_reasoning is not False:
            deltas.append({"reasoning_content": reasoning})
        for piece in pieces:
            deltas.append({"content": piece} if isinstance(piece, str) else _call_delta(piece))
        extras = self._extras(output, completion, first)
        if not deltas and extras and state.num_tokens > first:
            deltas.append({})
        events = []
        for i, delta in enumerate(deltas):
            choice = {"index": completion.index, "delta": delta, "logprobs": None}
            choice |= {"finish_reason": None} | (extras if i == len(deltas) - 1 else {})
            events.append(self._event(choice))
        # The last chunk has an empty delta and the reason.
        if completion.finished():
            state.is_done = True
            events.append(
                self._event(
                    {
                        "index": completion.index,
                        "delta": {},
                        "logprobs": None,
                        "finish_reason": self._reason(state, completion),
                        "stop_reason": completion.stop_reason,
                    }
                )
            )
        return b"".join(events)

    def _state(self, output: RequestOutput, completion: CompletionOutput) -> _Choice:
        state = self._choices.get(completion.index)
        if state is None:
            state = self._choices[completion.index] = _Choice(output, self._names)
        return state

    def _reason(self, state: _Choice, completion: CompletionOutput) -> str | None:
        if state.has_calls and completion.finish_reason == "stop":
            return "tool_calls"
        return completion.finish_reason

    def _extras(
        self, output: RequestOutput, completion: CompletionOutput, first: int
    ) -> dict[str, Any]:
        """Logprobs and token ids from token `first` on, where they are asked for."""
        extras: dict[str, Any] = {}
        if self._body.logprobs and completion.logprobs is not None:
            stop = len(completion.logprobs)
            content = chat_logprobs(
                completion.token_ids[first:stop],
                completion.logprobs[first:stop],
                self._body.top_logprobs or 0,
            )
            extras["logprobs"] = {"content": content, "refusal": None}
        if self._body.return_token_ids:
            extras["token_ids"] = completion.token_ids[first:]
            if not first:
                extras["prompt_token_ids"] = output.prompt_token_ids
        return extras

    def _event(self, choice: dict[str, Any]) -> bytes:
        return event(
            self._head | {"object": "chat.completion.chunk", "choices": [choice]} | self._usage
        )

    def end(self, outputs: list[RequestOutput]) -> bytes:
        last = b""
        if self._job.includes_usage:
            times = timings(outputs[0], is_explained=self._job.includes_explanation)
            told = {"choices": [], "usage": usage(outputs), "timings": times}
            last = event(self._head | {"object": "chat.completion.chunk"} | told)
        return last + b"data: [DONE]\n\n"

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        output = outputs[0]
        body = self._head | {
            "object": "chat.completion",
            "choices": [self._whole_choice(output, c) for c in output.outputs],
            "usage": usage(outputs),
            "timings": timings(output),
        }
        if self._body.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs)
        return body

    def _whole_choice(self, output: RequestOutput, completion: CompletionOutput) -> dict[str, Any]:
        state = self._state(output, completion)
        reasoning, pieces = state.read(completion)
        content = "".join(piece for piece in pieces if isinstance(piece, str))
        calls: list[dict[str, Any]] = []
        for piece in pieces:
            if isinstance(piece, str):
                continue
            if piece.name is not None:
                calls.append(
                    {
                        "id": piece.id,
                        "type": "function",
                        "function": {"name": piece.name, "arguments": piece.arguments},
                    }
                )
            else:
                calls[-1]["function"]["arguments"] += piece.arguments
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if calls:
            message["tool_calls"] = calls
            message["content"] = content or None
        if reasoning and self._body.include_reasoning is not False:
            message["reasoning_content"] = reasoning
        return {
            "index": completion.index,
            "message": message,
            "logprobs": None,
            "finish_reason": self._reason(state, completion),
            "stop_reason": completion.stop_reason,
        } | self._extras(output, completion, 0)


def _call_delta(piece: CallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": piece.arguments}
    call: dict[str, Any] = {"index": piece.index, "function": function}
    if piece.name is not None:
        call |= {"id": piece.id, "type": "function", "function": {"name": piece.name} | function}
    return {"tool_calls": [call]}
