"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API over the chat routes.

An answer is a list of blocks: `thinking`, `text` and `tool_use`. Reference: Anthropic's API. Their
thinking blocks carry a signature; ours is empty, and none is checked.
"""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from ..engine.prompts import tokenize_chat
from ..outputs import CompletionOutput, RequestOutput
from .conversation import AnswerForm, Change, Part, PartReader, check_chat
from .errors import ApiError, anthropic_error_body
from .generation import Job
from .protocol import ChatRequest, CountTokensRequest, MessagesRequest
from .service import Service
from .streaming import GeneratedResponse, event
from .translation import (
    Json,
    field_of,
    function_tool,
    join_text,
    refuse_type,
    renamed_errors,
    start_translated,
    usage_of,
)

__all__ = ["count_tokens", "message"]

_NAMES = {"max_completion_tokens": "max_tokens", "stop": "stop_sequences"}
_TEXTS = {"text": "text"}
_SAME = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed"),
    *("priority", "cache_salt"),
)


def message(service: Service, body: MessagesRequest, key: str) -> Response:
    """The response to a checked body. Raises ApiError or PellucidError where it is refused."""
    fields = _chat_fields(body, service)
    fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
    chat = ChatRequest(**fields)
    stream, params, form = start_translated(service, chat, key, _NAMES)
    job = Job.build("msg_", chat, params, key, stream)
    renderer = _Renderer(service, job, body, form)
    return GeneratedResponse(service, job, renderer, _failed)


async def count_tokens(service: Service, body: CountTokensRequest) -> dict[str, Any]:
    """How many tokens a conversation has, as `message` would send it to the model."""
    chat = ChatRequest(**_chat_fields(body, service))
    with renamed_errors(chat, _NAMES):
        check_chat(chat, service)
        prompt = await asyncio.to_thread(
            tokenize_chat,
            service.engine.tokenizer,
            chat.messages,
            tools=None if chat.tool_choice == "none" else chat.tools or None,
            add_generation_prompt=not chat.continue_final_message,
            continue_final_message=bool(chat.continue_final_message),
            chat_template_kwargs=chat.chat_template_kwargs or None,
        )
    return {"input_tokens": len(prompt.token_ids)}


# ---- the request


def _chat_fields(body: MessagesRequest | CountTokensRequest, service: Service) -> dict[str, Any]:
    """The fields of the chat request that both routes have."""
    service.check_model(body.model)
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields["messages"] = _messages(body, service.settings.max_messages)
    # An answer that the client has begun is gone on with.
    fields["continue_final_message"] = fields["messages"][-1]["role"] == "assistant"
    if body.tools is not None:
        for i, tool in enumerate(body.tools):
            if tool.get("type") not in (None, "custom"):
                raise refuse_type(f"tools[{i}].type", tool["type"], ["custom"])
        fields["tools"] = [
            function_tool(tool, f"tools[{i}]", "input_schema") for i, tool in enumerate(body.tools)
        ]
    fields |= _tool_choice(body)
    kwargs = dict(body.chat_template_kwargs or {})
    if body.thinking is not None:
        kinds = {"enabled": True, "adaptive": True, "disabled": False}
        kind = body.thinking.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise refuse_type("thinking.type", kind, kinds)
        kwargs.setdefault("enable_thinking", kinds[kind])
    return fields | {"chat_template_kwargs": kwargs}


def _tool_choice(body: MessagesRequest | CountTokensRequest) -> dict[str, Any]:
    choice = body.tool_choice
    if choice is None:
        return {}
    names = {"auto": "auto", "any": "required", "none": "none", "tool": None}
    kind = choice.get("type")
    if not isinstance(kind, str) or kind not in names:
        raise refuse_type("tool_choice.type", kind, names)
    chosen: Any = names[kind]
    if kind == "tool":
        name = field_of(choice, "name", "tool_choice")
        chosen = {"type": "function", "function": {"name": name}}
    is_single = choice.get("disable_parallel_tool_use", False)
    if not isinstance(is_single, bool):
        place = "tool_choice.disable_parallel_tool_use"
        raise ApiError(400, f"{place} must be true or false", param=place)
    return {"tool_choice": chosen, "parallel_tool_calls": not is_single}


def _messages(body: MessagesRequest | CountTokensRequest, most: int) -> list[dict[str, Any]]:
    """The conversation as chat messages, from at most `most` of the client's."""
    if not 0 < len(body.messages) <= most:
        count = len(body.messages)
        raise ApiError(
            400, f"messages has {count} entries; it must have between 1 and {most}",
            param="messages",
        )  # fmt: skip
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": join_text(body.system, "system", _TEXTS)})
    for i, given in enumerate(body.messages):
        place = f"messages[{i}]"
        content = given.get("content")
        # text is the same as one block of text
        blocks: Any = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not blocks:
            raise ApiError(
                400, f"{place}.content must be text or a list of blocks", param=f"{place}.content"
            )
        role = given.get("role")
        if role == "assistant":
            messages.append(_assistant_message(blocks, f"{place}.content"))
        elif role == "user":
            messages += _user_messages(blocks, f"{place}.content")
        else:
            raise refuse_type(f"{place}.role", role, ["user", "assistant"])
    return messages


def _user_messages(blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """A message for each tool's result, and one for the text between them."""
    messages: list[dict[str, Any]] = []
    text: list[str] = []  # of the last message, joined at the end
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        if kind == "tool_result":
            call_id = field_of(block, "tool_use_id", f"{place}[{i}]")
            content = block.get("content")
            result = join_text("" if content is None else content, f"{place}[{i}].content", _TEXTS)
            messages.append({"role": "tool", "tool_call_id": call_id, "content": result})
        elif kind == "text":
            if not messages or messages[-1]["role"] != "user":
                text = []
                messages.append({"role": "user", "content": text})
            text.append(field_of(block, "text", f"{place}[{i}]"))
        else:
            raise refuse_type(f"{place}[{i}].type", kind, ["text", "tool_result"])
    for message in messages:
        message["content"] = "".join(message["content"])
    return messages


def _assistant_message(blocks: list[Any], place: str) -> dict[str, Any]:
    """An answer: its thinking, text and calls."""
    text: list[str] = []
    thinking: list[str] = []
    calls: list[dict[str, Any]] = []
    for i, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, Mapping) else None
        at = f"{place}[{i}]"
        if kind == "text":
            text.append(field_of(block, "text", at))
        elif kind == "thinking":
            thinking.append(field_of(block, "thinking", at))
        elif kind == "tool_use":
            arguments = json.dumps(field_of(block, "input", at, dict), ensure_ascii=False)
            function = {"name": field_of(block, "name", at), "arguments": arguments}
            call_id = field_of(block, "id", at)
            calls.append({"id": call_id, "type": "function", "function": function})
        elif kind != "redacted_thinking":  # another model's, which nobody can read
            allowed = ["text", "thinking", "redacted_thinking", "tool_use"]
            raise refuse_type(f"{at}.type", kind, allowed)
    answer: dict[str, Any] = {"role": "assistant", "content": "".join(text)}
    if thinking:
        answer["reasoning_content"] = "".join(thinking)
    return answer | ({"tool_calls": calls} if calls else {})


# ---- the response


class _Renderer:
    """Bodies and events of messages."""

    def __init__(self, service: Service, job: Job, body: MessagesRequest, form: AnswerForm) -> None:
        self._body = body
        self._reader = PartReader(form)
        self._first_usage: dict[str, Any] = {}  # known from the first output on
        self._head: dict[str, Any] = {
            "id": job.id,
            "type": "message",
            "role": "assistant",
            "model": service.name,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    def begin(self) -> bytes:
        """It is called after the first `push`, whose events follow."""
        start = self._head | {"usage": self._first_usage}
        return _event("message_start", {"message": start}) + _event("ping", {})

    def push(self, place: int, output: RequestOutput) -> bytes:
        """The events of what is new."""
        if not self._first_usage:
            self._first_usage = _usage(output) | {"output_tokens": 0}
        return b"".join(map(_change, self._reader.read(output)))

    def end(self, outputs: list[RequestOutput]) -> bytes:
        told = {"delta": self._ending(outputs[0].outputs[0]), "usage": _usage(outputs[0])}
        return _event("message_delta", told) + _event("message_stop", {})

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        self._reader.read(outputs[0])
        content = [_block(part) for part in self._reader.parts]
        told = {"content": content, "usage": _usage(outputs[0])}
        return self._head | self._ending(outputs[0].outputs[0]) | told

    def _ending(self, completion: CompletionOutput) -> dict[str, Any]:
        """Why the answer ended."""
        found = completion.stop_reason
        sequence = found if isinstance(found, str) else None
        if completion.finish_reason == "length":
            is_asked = completion.num_tokens >= self._body.max_tokens
            reason = "max_tokens" if is_asked else "model_context_window_exceeded"
        elif sequence is not None:
            reason = "stop_sequence"
        else:
            reason = "tool_use" if self._reader.has_calls else "end_turn"
        return {"stop_reason": reason, "stop_sequence": sequence}


def _change(change: Change) -> bytes:
    """The events of one change."""
    part = change.part
    if change.kind == "close":
        return _event("content_block_stop", {"index": part.index})
    if change.kind == "open":
        start = _block(part, is_empty=True)
        return _event("content_block_start", {"index": part.index, "content_block": start})
    kind, field = {
        "reasoning": ("thinking_delta", "thinking"),
        "text": ("text_delta", "text"),
        "call": ("input_json_delta", "partial_json"),
    }[part.kind]
    delta = {"type": kind, field: change.text}
    return _event("content_block_delta", {"index": part.index, "delta": delta})


def _block(part: Part, *, is_empty: bool = False) -> dict[str, Any]:
    """A part as a block of the message."""
    content = "" if is_empty else part.content
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": content, "signature": ""}
    if part.kind == "text":
        return {"type": "text", "text": content, "citations": None}
    given = {} if is_empty else _arguments(content)
    return {"type": "tool_use", "id": part.call_id, "name": part.name, "input": given}


def _arguments(text: str) -> Json:
    """A call's arguments. A call that was cut off has none that could be read."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _usage(output: RequestOutput) -> dict[str, Any]:
    """Tokens as Anthropic counts them: those that the cache had are no input tokens."""
    num_prompt, num_cached, num_output = usage_of(output)
    return {
        "input_tokens": num_prompt - num_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": num_cached,
        "output_tokens": num_output,
    }


def _event(kind: str, data: Json) -> bytes:
    return event({"type": kind, **data}, kind)


def _failed(error: ApiError) -> bytes:
    """The last event of a stream that an error ended."""
    return event(anthropic_error_body(error), "error")
