"""POST /v1/messages with Anthropic's own client; the translation of its messages; its errors."""

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("anthropic", reason="the route is tested with Anthropic's client")

import anthropic

from pellucid.server.messages import _messages
from pellucid.server.protocol import MessagesRequest
from tests.server.conftest import START_SECONDS, Server

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"name": "weather", "description": "The weather", "input_schema": SCHEMA}]
# clients of some versions have no arguments for these
GREEDY: Any = {"extra_body": {"temperature": 0, "top_k": 1}}
HELLO: Any = [{"role": "user", "content": "Name a colour."}]


def client_of(server: Server, key: str = "none") -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=server.url, api_key=key, max_retries=0, timeout=START_SECONDS
    )


@pytest.fixture
def smol_client(smol: Server) -> Iterator[anthropic.Anthropic]:
    with client_of(smol) as client:
        yield client


@pytest.fixture
def tiny_client(server: Server) -> Iterator[anthropic.Anthropic]:
    with client_of(server) as client:
        yield client


def test_a_text_whole_and_streamed(smol_client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "smol", "messages": HELLO, "max_tokens": 200} | GREEDY
    asked["system"] = [{"type": "text", "text": "Answer in one word."}]
    whole: Any = smol_client.messages.create(**asked)
    assert (whole.stop_reason, whole.stop_sequence) == ("end_turn", None)
    assert [block.type for block in whole.content] == ["text"] and whole.content[0].text
    usage = whole.usage
    prompt_tokens = usage.input_tokens + usage.cache_read_input_tokens
    counted = smol_client.messages.count_tokens(
        **{name: asked[name] for name in ("model", "messages", "system")}
    )
    assert counted.input_tokens == prompt_tokens
    # The stream tells the same, its events in order.
    events: Any = list(smol_client.messages.create(**asked, stream=True))
    kinds = [event.type for event in events if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    start = events[0].message.usage
    assert start.input_tokens + start.cache_read_input_tokens == prompt_tokens
    text = "".join(e.delta.text for e in events if e.type == "content_block_delta")
    assert text == whole.content[0].text
    assert events[-2].delta.stop_reason == "end_turn"
    assert events[-2].usage.output_tokens == usage.output_tokens
    # Anthropic's helper gathers the events without complaint.
    with smol_client.messages.stream(**asked) as stream:
        assert stream.get_final_text() == text


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_is_read(
    smol_client: anthropic.Anthropic, choice: Any
) -> None:
    asked: Any = {
        "model": "smol",
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "tools": TOOLS,
        "tool_choice": choice | {"disable_parallel_tool_use": True},
        "max_tokens": 60,
    } | GREEDY
    whole: Any = smol_client.messages.create(**asked)
    assert whole.stop_reason == "tool_use"
    assert [block.type for block in whole.content] == ["tool_use"]
    call = whole.content[0]
    assert call.name == "weather" and call.input["city"] in ("Paris", "Rome")
    with smol_client.messages.stream(**asked) as stream:
        final: Any = stream.get_final_message()
    assert final.stop_reason == "tool_use" and final.content[0].input == call.input
    # The call and its result go back as blocks.
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
    asked["messages"] += [
        {"role": "assistant", "content": whole.content},
        {"role": "user", "content": [result]},
    ]
    again = smol_client.messages.create(**asked)
    assert again.stop_reason == "tool_use"


def test_ends_of_an_answer(locked: Server) -> None:
    with client_of(locked, "secret") as client:
        asked: Any = {"model": "tiny", "messages": HELLO} | GREEDY
        cut: Any = client.messages.create(**asked, max_tokens=8)
        assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 8
        text = cut.content[0].text
        stopped: Any = client.messages.create(**asked, max_tokens=8, stop_sequences=[text[3:5]])
        assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", text[3:5])
        assert stopped.content[0].text == text[: text.index(text[3:5])]


def test_an_answer_that_has_begun_is_gone_on_with(smol_client: anthropic.Anthropic) -> None:
    begun: Any = [*HELLO, {"role": "assistant", "content": "The colour is"}]
    asked: Any = {"model": "smol", "max_tokens": 4} | GREEDY
    new: Any = smol_client.messages.create(**asked, messages=HELLO)
    gone_on: Any = smol_client.messages.create(**asked, messages=begun)
    assert gone_on.content[0].text != new.content[0].text
    count = smol_client.messages.count_tokens
    assert (
        count(model="smol", messages=begun).input_tokens
        > count(model="smol", messages=HELLO).input_tokens
    )


@pytest.mark.parametrize(
    ("fields", "status", "kind", "word"),
    [
        ({"model": "claude"}, 404, "not_found_error", "model"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"max_tokens": 0}, 400, "invalid_request_error", "max_tokens"),
        ({"max_tokens": "9"}, 400, "invalid_request_error", "max_tokens"),
        ({"extra_body": {"temperature": -1}}, 400, "invalid_request_error", "temperature"),
        ({"stop_sequences": ["a"] * 99}, 400, "invalid_request_error", "stop_sequences"),
        ({"messages": [{"role": "system", "content": "a"}]}, 400, "invalid_request_error",
         "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400,
         "invalid_request_error", "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": {}}]}]}, 400,
         "invalid_request_error", "messages[0].content[0].type"),
        ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1",
          "name": "f", "input": "x"}]}]}, 400, "invalid_request_error",
         "messages[0].content[0].input"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, 400, "invalid_request_error",
         "prompt"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 400, "invalid_request_error",
         "tools[0].type"),
        ({"tools": [{"name": "f", "input_schema": 3}]}, 400, "invalid_request_error",
         "tools[0].input_schema"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "tool_choice"),
        ({"tool_choice": {"type": "some"}}, 400, "invalid_request_error", "tool_choice.type"),
        ({"thinking": {"type": "deep"}}, 400, "invalid_request_error", "thinking.type"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_have_anthropics_form(
    tiny_client: anthropic.Anthropic,
    fields: dict[str, Any],
    status: int,
    kind: str,
    word: str,
    is_stream: bool,
) -> None:
    asked: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 4} | fields
    with pytest.raises(anthropic.APIStatusError) as caught:
        tiny_client.messages.create(**asked, stream=is_stream)
    assert caught.value.status_code == status
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == kind
    assert body["error"]["message"].startswith((word, f"the {word}"))


def ask(url: str, key: str, data: bytes | None) -> tuple[int, Any]:
    """The status and the body of a request that is not the client's."""
    headers = {"x-api-key": key, "content-type": "application/json"}
    try:
        request = urllib.request.Request(url, data, headers)
        with urllib.request.urlopen(request, timeout=START_SECONDS) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_errors_before_the_route_have_anthropics_form(locked: Server) -> None:
    url = f"{locked.url}/v1/messages"
    for path, key, data, status, kind in (
        ("", "other", b"{}", 401, "authentication_error"),
        ("", "secret", b"{", 400, "invalid_request_error"),
        ("", "secret", b'{"max_tokens": 1}', 400, "invalid_request_error"),
        ("/count_tokens", "secret", b"{}", 400, "invalid_request_error"),
        ("", "secret", None, 405, "invalid_request_error"),
    ):
        told = ask(url + path, key, data)
        assert (told[0], told[1]["type"], told[1]["error"]["type"]) == (status, "error", kind)
    # other routes keep OpenAI's form
    assert ask(f"{locked.url}/v1/completions", "secret", b"{}")[1].keys() == {"error"}


def test_blocks_become_messages_in_their_order() -> None:
    given: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "t", "signature": ""},
            {"type": "text", "text": "x"},
            {"type": "tool_use", "id": "1", "name": "f", "input": {"k": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "r"}]},
            {"type": "tool_result", "tool_use_id": "2"},
            {"type": "text", "text": "and?"},
        ]},
    ]  # fmt: skip
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"k": 1}'}}
    body = MessagesRequest(messages=given, system="s", max_tokens=1)
    assert _messages(body, 10) == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "x", "reasoning_content": "t", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "r"},
        {"role": "tool", "tool_call_id": "2", "content": ""},
        {"role": "user", "content": "and?"},
    ]
