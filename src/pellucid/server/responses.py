"""POST /v1/responses: OpenAI's Responses API over the chat routes.

An answer is a list of items: `reasoning`, `message` and `function_call`. Nothing is kept after it
was sent, so `store`, `previous_response_id` and `background` are refused. A client sends the whole
conversation with each request.
"""

import time
import uuid
from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from starlette.responses import Response

from ..outputs import RequestOutput
from .conversation import AnswerForm, Change, Part, PartReader
from .errors import ApiError, error_body
from .generation import Job
from .harmony import REASONING_END
from .protocol import ChatRequest, ResponsesRequest
from .reasoning import THINK_END, count_reasoning
from .service import Service
from .streaming import GeneratedResponse, event
from .translation import (
    Json,
    field_of,
    function_tool,
    join_text,
    refuse_type,
    start_translated,
    usage_of,
)

__all__ = ["respond"]

# fields of the chat request, by the client's names
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
    "structured_outputs": "text.format",
    "reasoning_effort": "reasoning.effort",
}
_TEXTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("priority", "cache_salt", "chat_template_kwargs", "parallel_tool_calls"),
)
_ITEMS = ["message", "function_call", "function_call_output", "reasoning"]


def respond(service: Service, body: ResponsesRequest, key: str) -> Response:
    """The response to a checked body. Raises ApiError or PellucidError where it is refused."""
    _refuse_what_needs_a_store(body)
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields["messages"] = _messages(body, service.settings.max_messages)
    fields["max_completion_tokens"] = body.max_output_tokens
    fields["response_format"] = _response_format(body)
    fields["tools"] = _tools(body)
    fields["tool_choice"] = _tool_choice(body)
    fields["reasoning_effort"] = (body.reasoning or {}).get("effort")
    if not isinstance(fields["reasoning_effort"], str | None):
        raise ApiError(400, "reasoning.effort must be text", param="reasoning.effort")
    chat = ChatRequest(**fields)
    stream, params, form = start_translated(service, chat, key, _NAMES)
    job = Job.build("resp_", chat, params, key, stream)
    renderer = _Renderer(service, job, body, form)
    return GeneratedResponse(service, job, renderer, renderer.failed)


def _refuse_what_needs_a_store(body: ResponsesRequest) -> None:
    why = "answers are not kept here; send the whole conversation as input"
    for name in ("store", "background", "previous_response_id", "conversation", "prompt"):
        if getattr(body, name):
            raise ApiError(400, f"{name} is not supported: {why}", param=name)
    if body.truncation not in (None, "disabled"):
        raise ApiError(
            400, "truncation must be 'disabled': a prompt is never cut silently", param="truncation"
        )
    if any(name.endswith("logprobs") for name in body.include or ()):
        raise ApiError(
            400, "include has logprobs, which /v1/chat/completions tells", param="include"
        )


# ---- the request


def _messages(body: ResponsesRequest, most: int) -> list[dict[str, Any]]:
    """The conversation as chat messages, from at most `most` items."""
    if isinstance(body.input, str):
        items: list[Any] = [{"role": "user", "content": body.input}]
    else:
        items = body.input
    if not 0 < len(items) <= most:
        raise ApiError(
            400, f"input has {len(items)} items; it must have between 1 and {most}", param="input"
        )
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        _add_item(messages, item, f"input[{i}]")
    if messages[-1].keys() == {"role", "reasoning_content"}:
        told = "input ends with a reasoning item; an answer must follow it"
        raise ApiError(400, told, param="input")
    # Some templates allow one system message, which stands first.
    texts = [] if body.instructions is None else [body.instructions]
    first = list(takewhile(lambda message: message["role"] == "system", messages))
    texts += [message["content"] for message in first]
    system = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    messages = system + messages[len(first) :]
    # An item of reasoning may have lost its answer.
    for message in messages:
        message.setdefault("content", "")
    return messages


def _add_item(messages: list[dict[str, Any]], item: Json, place: str) -> None:
    """Add one item of the input to the messages; items of one answer become one message."""
    kind = item.get("type", "message")
    if kind == "message":
        _add_message(messages, item, place)
    elif kind == "function_call":
        function = {
            "name": field_of(item, "name", place),
            "arguments": field_of(item, "arguments", place),
        }
        call = {"id": field_of(item, "call_id", place), "type": "function", "function": function}
        _answer(messages).setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        output = join_text(item.get("output"), f"{place}.output", _TEXTS)
        call_id = field_of(item, "call_id", place)
        messages.append({"role": "tool", "tool_call_id": call_id, "content": output})
    elif kind == "reasoning":
        content = item.get("content") or item.get("summary") or []
        kinds = {"reasoning_text": "text", "summary_text": "text"}
        messages.append({"role": "assistant"})
        messages[-1]["reasoning_content"] = join_text(content, f"{place}.content", kinds)
    else:
        raise refuse_type(f"{place}.type", kind, _ITEMS)


def _add_message(messages: list[dict[str, Any]], item: Json, place: str) -> None:
    roles = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
    role = item.get("role")
    if not isinstance(role, str) or role not in roles:
        raise refuse_type(f"{place}.role", role, roles)
    content = join_text(item.get("content"), f"{place}.content", _TEXTS)
    before = messages[-1] if messages else {}
    if role == "assistant" and before.keys() == {"role", "reasoning_content"}:
        before["content"] = content
    else:
        messages.append({"role": roles[role], "content": content})


def _answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The assistant's message that a call belongs to."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    messages[-1].setdefault("content", "")
    return messages[-1]


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    """The chat request's form of `text.format`."""
    form = (body.text or {}).get("format")
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if not isinstance(form, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise refuse_type("text.format.type", kind, ["text", "json_object", "json_schema"])
    if kind != "json_schema":
        return {"type": kind}
    schema = field_of(form, "schema", "text.format", dict)
    return {"type": kind, "json_schema": {"name": form.get("name"), "schema": schema}}


def _tools(body: ResponsesRequest) -> list[dict[str, Any]] | None:
    if body.tools is None:
        return None
    for i, tool in enumerate(body.tools):
        if tool.get("type") != "function":
            raise refuse_type(f"tools[{i}].type", tool.get("type"), ["function"])
    return [function_tool(tool, f"tools[{i}]", "parameters") for i, tool in enumerate(body.tools)]


def _tool_choice(body: ResponsesRequest) -> Any:
    choice = body.tool_choice
    if not isinstance(choice, Mapping):
        return choice
    if choice.get("type") != "function":
        raise refuse_type("tool_choice.type", choice.get("type"), ["function"])
    return {"type": "function", "function": {"name": field_of(choice, "name", "tool_choice")}}


# ---- the response


class _Renderer:
    """Bodies and events of responses."""

    def __init__(
        self, service: Service, job: Job, body: ResponsesRequest, form: AnswerForm
    ) -> None:
        self._token_bytes = service.engine.tokenizer.token_bytes
        self._is_harmony = form.is_harmony
        self._reader = PartReader(form)
        self._ids: list[str] = []  # of the parts
        self._num_events = 0
        self._is_cut = False  # the answer ended before it was whole
        self._head = _head(service, job, body)

    def begin(self) -> bytes:
        """It is called after the first `push`, whose events follow: these two have numbers 0, 1."""
        return self._lifecycle("created", 0) + self._lifecycle("in_progress", 1)

    def _lifecycle(self, kind: str, number: int) -> bytes:
        data = {"type": f"response.{kind}", "sequence_number": number}
        return event(data | {"response": self._head}, data["type"])  # type: ignore[arg-type]

    def push(self, place: int, output: RequestOutput) -> bytes:
        """The events of what is new."""
        self._num_events = max(2, self._num_events)
        self._is_cut = output.outputs[0].finish_reason not in (None, "stop")
        return b"".join(map(self._change, self._reader.read(output)))

    def _change(self, change: Change) -> bytes:
        """The events of one change."""
        part = change.part
        if change.kind == "open":
            self._ids.append(_item_id(part))
        item_id = self._ids[part.index]
        place: dict[str, Any] = {"item_id": item_id, "output_index": part.index}
        if part.kind != "call":
            place["content_index"] = 0
        text = "reasoning_text" if part.kind == "reasoning" else "output_text"
        logprobs: dict[str, Any] = {"logprobs": []} if part.kind == "text" else {}
        if change.kind == "open":
            item = self._item(part, "in_progress", is_empty=True)
            added = self._event("output_item.added", {"output_index": part.index, "item": item})
            if part.kind == "call":
                return added
            return added + self._event("content_part.added", place | {"part": _content(part, "")})
        if change.kind == "grow":
            name = "function_call_arguments" if part.kind == "call" else text
            return self._event(f"{name}.delta", place | {"delta": change.text} | logprobs)
        # A part that is whole is told whole.
        if part.kind == "call":
            told = {"name": part.name, "arguments": part.content}
            done = self._event("function_call_arguments.done", place | told)
        else:
            done = self._event(f"{text}.done", place | {"text": part.content} | logprobs)
            content = _content(part, part.content)
            done += self._event("content_part.done", place | {"part": content})
        item = self._item(part, self._status(part))
        return done + self._event("output_item.done", {"output_index": part.index, "item": item})

    def _event(self, kind: str, data: dict[str, Any]) -> bytes:
        number = self._num_events
        self._num_events += 1
        name = f"response.{kind}"
        return event({"type": name, "sequence_number": number} | data, name)

    def _status(self, part: Part) -> str:
        is_last = part.index == len(self._reader.parts) - 1
        return "incomplete" if self._is_cut and is_last else "completed"

    def _item(self, part: Part, status: str, *, is_empty: bool = False) -> dict[str, Any]:
        """A part as an item of the response."""
        item: dict[str, Any] = {"id": self._ids[part.index], "status": status}
        content = [] if is_empty else [_content(part, part.content)]
        if part.kind == "reasoning":
            return item | {"type": "reasoning", "summary": [], "content": content}
        if part.kind == "text":
            return item | {"type": "message", "role": "assistant", "content": content}
        arguments = "" if is_empty else part.content
        call = {"call_id": part.call_id, "name": part.name, "arguments": arguments}
        return item | {"type": "function_call"} | call

    def end(self, outputs: list[RequestOutput]) -> bytes:
        body = self._body(outputs[0])
        kind = "incomplete" if body["status"] == "incomplete" else "completed"
        return self._event(kind, {"response": body})

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        self.push(0, outputs[0])
        return self._body(outputs[0])

    def _body(self, output: RequestOutput) -> dict[str, Any]:
        """The response that has ended."""
        num_prompt, num_cached, num_output = usage_of(output)
        told: dict[str, Any] = {
            "status": "incomplete" if self._is_cut else "completed",
            "completed_at": None if self._is_cut else int(time.time()),
            "output": [self._item(part, self._status(part)) for part in self._reader.parts],
            "usage": {
                "input_tokens": num_prompt,
                "input_tokens_details": {"cached_tokens": num_cached},
                "output_tokens": num_output,
                "output_tokens_details": {"reasoning_tokens": self._num_reasoning(output)},
                "total_tokens": num_prompt + num_output,
            },
        }
        if self._is_cut:
            told["incomplete_details"] = {"reason": "max_output_tokens"}
        return self._head | told

    def _num_reasoning(self, output: RequestOutput) -> int:
        if not any(part.kind == "reasoning" for part in self._reader.parts):
            return 0
        tokens = map(self._token_bytes, output.outputs[0].token_ids)
        return count_reasoning(tokens, REASONING_END if self._is_harmony else THINK_END)

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that an error ended."""
        told = error_body(error)["error"]
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        problem = {"code": code, "message": told["message"]}
        body = self._head | {"status": "failed", "error": problem}
        body["output"] = [self._item(part, "incomplete") for part in self._reader.parts]
        return self._event("failed", {"response": body})


def _item_id(part: Part) -> str:
    prefix = {"reasoning": "rs", "text": "msg", "call": "fc"}[part.kind]
    return f"{prefix}_{uuid.uuid4().hex}"


def _content(part: Part, text: str) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _head(service: Service, job: Job, body: ResponsesRequest) -> dict[str, Any]:
    """A response that has just begun: what the request asked for."""
    return {
        "id": job.id,
        "object": "response",
        "created_at": job.created,
        "status": "in_progress",
        "background": False,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": service.name,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
        "store": False,
        "temperature": body.temperature,
        "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }
