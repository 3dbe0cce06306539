"""The requests that Open WebUI sends (backend/open_webui/routers/{openai,tasks}.py): the list of
models, a chat with usage, titles, tags, and tools.
"""

import json
import urllib.request
from typing import Any

import pytest

from tests.server.conftest import START_SECONDS, Server

TEMPLATE = (
    "### Task:\nGenerate a concise title with an emoji.\n<chat_history>\nUSER: Hi\n</chat_history>"
)


def ask(server: Server, path: str, body: Any = None) -> str:
    """The answer to a request, as text: POST where there is a body."""
    headers = {"Authorization": "Bearer none", "Content-Type": "application/json"}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{server.url}/v1{path}", data, headers)
    with urllib.request.urlopen(request, timeout=START_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def chat(server: Server, **fields: Any) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    return ask(server, "/chat/completions", body | fields)


def test_models_are_listed_and_shown(server: Server) -> None:
    (listed,) = json.loads(ask(server, "/models"))["data"]
    assert listed["id"] == "tiny" and listed["object"] == "model" and listed["owned_by"]
    assert json.loads(ask(server, "/models/tiny"))["id"] == "tiny"


def test_a_chat_is_streamed_with_usage(server: Server) -> None:
    answer = chat(
        server,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0.8,
        top_p=0.9,
        frequency_penalty=0.0,
        seed=0,
        stop=["\n\n"],
        logit_bias={"5": -100},
    )
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] <= 4
    assert chunks[-2]["choices"][0]["finish_reason"] in ("stop", "length")


@pytest.mark.parametrize(
    "fields",
    [
        {"max_completion_tokens": 1000, "max_tokens": None},
        {"temperature": None, "stop": None, "tools": None, "tool_choice": None},
        {"metadata": {"task": "title_generation", "chat_id": None, "task_body": {"messages": []}}},
        {
            "user": "u",
            "reasoning_effort": "low",
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ],
)
def test_titles_and_tags_are_whole_answers(server: Server, fields: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": TEMPLATE}]
    answer = json.loads(chat(server, messages=messages, stream=False, **fields))
    assert isinstance(answer["choices"][0]["message"]["content"], str)


def test_a_chat_goes_on_after_tools(server: Server) -> None:
    call = {"name": "search", "arguments": '{"query": "x"}'}
    tool = {"name": "search", "description": "Search", "parameters": {"type": "object"}}
    messages = [
        {"role": "system", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "Look it up"}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": "call_1", "index": 0, "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "found"},
        {"role": "assistant", "content": "It was found.", "reasoning_content": "Let me see."},
        {"role": "user", "content": "Thanks"},
    ]
    tools = [{"type": "function", "function": tool}]
    answer = json.loads(chat(server, messages=messages, tools=tools))
    assert answer["choices"][0]["finish_reason"] in ("stop", "length", "tool_calls")
