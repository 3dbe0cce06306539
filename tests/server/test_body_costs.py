"""A body of megabytes costs its parsing, not an error or a comparison for each of its values."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")

from pydantic import BaseModel, ValidationError

from pellucid.server.errors import ApiError, as_api_error
from pellucid.server.json_bounds import MAX_CONTAINERS, check_containers
from pellucid.server.protocol import (
    ChatRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    MessagesRequest,
    ResponsesRequest,
)

COUNT = 100_000

BODIES: dict[str, tuple[type[BaseModel], dict[str, Any], str | None]] = {
    "prompts of null": (CompletionRequest, {"prompt": [None] * COUNT}, "prompt"),
    "empty lists": (CompletionRequest, {"prompt": [[]] * COUNT}, "prompt"),
    "prompts": (CompletionRequest, {"prompt": ["a"] * COUNT}, "prompt"),
    "token ids": (CompletionRequest, {"prompt": [1] * (1 << 20) + [1]}, "prompt"),
    "messages": (ChatRequest, {"messages": [1] * COUNT}, "messages"),
    "stop": (CompletionRequest, {"prompt": "a", "stop": [1] * COUNT}, "stop"),
    "stop ids": (CompletionRequest, {"prompt": "a", "stop_token_ids": [""] * COUNT},
                 "stop_token_ids"),
    "tokens": (DetokenizeRequest, {"tokens": ["a"] * COUNT}, "tokens"),
    "biases": (CompletionRequest, {"prompt": "a", "logit_bias": dict.fromkeys(
        map(str, range(COUNT)), "a")}, "logit_bias"),
    "tools": (ChatRequest, {"messages": [{}], "tools": [1] * COUNT}, "tools"),
    "input": (ResponsesRequest, {"input": [1] * COUNT}, "input"),
    "include": (ResponsesRequest, {"input": "a", "include": [1] * COUNT}, "include"),
    "tools of responses": (ResponsesRequest, {"input": "a", "tools": [1] * COUNT}, "tools"),
    "Anthropic's messages": (MessagesRequest, {"messages": [1] * COUNT, "max_tokens": 1},
                             "messages"),
    "system": (MessagesRequest, {"messages": [{}], "system": [1] * COUNT, "max_tokens": 1},
               "system"),
    "stop sequences": (MessagesRequest, {"messages": [], "stop_sequences": [1] * COUNT,
                                         "max_tokens": 1}, "stop_sequences"),
    "Anthropic's tools": (CountTokensRequest, {"messages": [{}], "tools": [1] * COUNT}, "tools"),
    "unknown fields": (CompletionRequest, {"prompt": "a"} | {f"x{i}": 1 for i in range(COUNT)},
                       None),
}  # fmt: skip


@pytest.mark.parametrize("piece", [b"[]", b"{}", b'{"a":[]}', b'"[",[]', b'"\\\\",[]'])
@pytest.mark.parametrize("field", ["prompt", "stop", "messages", "tools", "logit_bias", "other"])
def test_a_million_lists_are_refused_before_they_are_parsed(piece: bytes, field: str) -> None:
    """They would hold the event loop for a second."""
    body = b'{"%s": [%s]}' % (field.encode(), b",".join([piece] * MAX_CONTAINERS))
    with pytest.raises(ApiError, match=f"more than {MAX_CONTAINERS} lists and objects"):
        asyncio.run(check_containers(body))


@pytest.mark.parametrize("text", ["[" * (1 << 20), '"{' * (1 << 18), "\\" * 9 + "[{" * (1 << 18)])
@pytest.mark.parametrize("more", [0, 1])
def test_brackets_in_a_text_are_no_lists(text: str, more: int) -> None:
    body = json.dumps({"prompt": text, "x": "\\" * more, "stop": [[]] * 9}).encode()
    asyncio.run(check_containers(body))


@pytest.mark.parametrize("name", BODIES)
def test_the_first_mistakes_end_the_check(name: str) -> None:
    model, body, param = BODIES[name]
    with pytest.raises(ValidationError) as caught:
        model.model_validate_json(json.dumps(body))
    assert caught.value.error_count() < 10
    told = as_api_error(caught.value)
    assert told.status == 400 and len(told.message) < 500
    assert (told.param or "").split(".")[0] == (param or "")
