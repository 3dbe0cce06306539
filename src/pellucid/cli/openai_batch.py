"""The lines of OpenAI's Batch API. `vllm run-batch` uses the same format.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": …}}
    {"id": …, "custom_id": "a", "response": {"status_code": 200, "body": …}, "error": null}

The URLs are /v1/chat/completions and /v1/completions. A field of the body that Pellucid does not
support is refused by name; null means that a field is not given. Besides OpenAI's fields the body
may have those of `SamplingParams`, as in vLLM.

Reference: https://platform.openai.com/docs/api-reference/batch
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import Any

from ..errors import RequestError
from ..outputs import CompletionOutput, LogprobsOnePosition, RequestOutput
from ..sampling_params import SamplingParams
from ..structured_params import StructuredOutputsParams
from .answer import report_explanation
from .batch_lines import CHAT, Asked, Line

__all__ = ["openai_answer", "openai_error", "parse_openai"]

_CHAT_URL, _TEXT_URL = "/v1/chat/completions", "/v1/completions"
_LINE_FIELDS = {"custom_id", "method", "url", "body"}
# Fields that do not change an answer.
_NO_EFFECT = {"model", "user", "store", "metadata", "service_tier", "parallel_tool_calls"}
# (field, supported values)
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tool_choice": ("auto", "none"),
}


def parse_openai(value: Mapping[str, Any]) -> Asked:
    """The request in a line. Raises RequestError, naming the field, if it is not supported."""
    unknown = sorted(value.keys() - _LINE_FIELDS)
    if unknown:
        raise RequestError(f"{unknown[0]!r} is no field of a line of a batch")
    if value.get("method", "POST") != "POST":
        raise RequestError(f"method is {value['method']!r:.60}; it must be POST")
    url, body = value.get("url"), value.get("body")
    if url not in (_CHAT_URL, _TEXT_URL):
        raise RequestError(f"url is {url!r:.60}; it must be {_CHAT_URL} or {_TEXT_URL}")
    if not isinstance(body, Mapping):
        raise RequestError("body must be a JSON object")
    return _parse_body({k: v for k, v in body.items() if v is not None}, url == _CHAT_URL)


def _parse_body(body: dict[str, Any], is_chat: bool) -> Asked:
    # Ignore fields without an effect, and refuse fields that are not supported.
    use_tools = body.get("tool_choice") != "none"
    for name, neutral in _NEUTRAL.items():
        if name in body and body.pop(name) not in neutral:
            allowed = ", ".join(map(repr, neutral)) or "absent"
            raise RequestError(f"{name} must be {allowed}: nothing else can be had here")
    for name in _NO_EFFECT:
        body.pop(name, None)
    # The prompt
    prompt: dict[str, Any] = {n: body.pop(n) for n in ("priority", "cache_salt") if n in body}
    messages, chat = None, {}
    if is_chat:
        messages = body.pop("messages", None)
        chat = {name: body.pop(name) for name in CHAT if name in body}
        if messages is None:
            raise RequestError("messages is missing from the body")
        if not use_tools:
            chat.pop("tools", None)
    else:
        prompt |= _prompt(body.pop("prompt", None))
    # Build the sampling parameters.
    if "max_completion_tokens" in body:
        body["max_tokens"] = body.pop("max_completion_tokens")
    if is_chat:
        _read_chat_logprobs(body)
    if "response_format" in body:
        wanted = StructuredOutputsParams.from_response_format(body.pop("response_format"))
        body.setdefault("structured_outputs", wanted)
    unknown = sorted(body.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        raise RequestError(f"{unknown[0]!r} in the body is not a field that can be obeyed")
    return Asked(prompt, messages, chat, body)


def _prompt(prompt: object) -> dict[str, Any]:
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, list) and prompt and all(isinstance(i, int) for i in prompt):
        return {"prompt_token_ids": prompt}
    raise RequestError("prompt must be one text or one list of token ids; give each its own line")


def _read_chat_logprobs(body: dict[str, Any]) -> None:
    """OpenAI's two fields become one: the number of alternatives for each token."""
    wanted, top = body.pop("logprobs", False), body.pop("top_logprobs", None)
    if not isinstance(wanted, bool):
        raise RequestError(f"logprobs is {wanted!r:.60}; it must be true or false in a chat")
    if top is not None and not wanted:
        raise RequestError("top_logprobs needs logprobs to be true")
    if wanted:
        body["logprobs"] = 0 if top is None else top


def openai_answer(line: Line, output: RequestOutput, timing: Any, model: str) -> dict[str, Any]:
    """The record of an answer. `timing`: a dataclass of figures, or None."""
    for completion in output.outputs:
        if completion.finish_reason == "error":
            return openai_error(line, f"the answer broke off: {completion.stop_reason}", 500)
    is_chat = line.value is not None and line.value.get("url") == _CHAT_URL
    num_output = sum(completion.num_tokens for completion in output.outputs)
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{line.digest}",
        "object": "chat.completion" if is_chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(completion, is_chat) for completion in output.outputs],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": num_output,
            "total_tokens": len(output.prompt_token_ids) + num_output,
            "prompt_tokens_details": {"cached_tokens": output.num_cached_tokens},
        },
    }
    if timing is not None:
        body["timing"] = asdict(timing) | report_explanation(output)
    return _record(line, 200, body, None)


def openai_error(line: Line, message: str, status: int = 400) -> dict[str, Any]:
    """The record of a request that could not be answered."""
    kind = "invalid_request_error" if status == 400 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": status}
    return _record(line, status, {"error": error}, {"code": kind, "message": message})


def _record(
    line: Line, status: int, body: dict[str, Any], error: dict[str, Any] | None
) -> dict[str, Any]:
    response = {"status_code": status, "request_id": f"req_{line.digest}", "body": body}
    return {
        "id": f"batch_req_{line.digest}",
        "custom_id": line.name,
        "response": response,
        "error": error,
    }


def _choice(completion: CompletionOutput, is_chat: bool) -> dict[str, Any]:
    said: dict[str, Any]
    if is_chat:
        said = {"message": {"role": "assistant", "content": completion.text}}
    else:
        said = {"text": completion.text}
    logprobs = None
    if completion.logprobs is not None:
        rows = list(zip(completion.token_ids, completion.logprobs, strict=True))
        logprobs = {"content": list(map(_chat_logprob, rows))} if is_chat else _text_logprobs(rows)
    return {
        "index": completion.index,
        **said,
        "logprobs": logprobs,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }


def _chat_logprob(chosen: tuple[int, LogprobsOnePosition]) -> dict[str, Any]:
    token_id, row = chosen
    entries = {
        i: {
            "token": entry.decoded_token or "",
            "logprob": entry.logprob,
            "bytes": list(entry.token_bytes or b""),
        }
        for i, entry in row.items()
    }
    return {**entries[token_id], "top_logprobs": list(entries.values())}


def _text_logprobs(rows: Sequence[tuple[int, LogprobsOnePosition]]) -> dict[str, Any]:
    tokens = [row[token_id].decoded_token or "" for token_id, row in rows]
    return {
        "tokens": tokens,
        "token_logprobs": [row[token_id].logprob for token_id, row in rows],
        "top_logprobs": [
            {entry.decoded_token or "": entry.logprob for entry in row.values()} for _, row in rows
        ],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0)),
    }
