"""OpenAI's own client against a live server."""

import json
from typing import Any

import openai
import pytest

from tests.server.conftest import Server

MESSAGES: Any = [{"role": "user", "content": "Hello"}]


def test_models(server: Server) -> None:
    client = server.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "pellucid"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_whole_and_streamed(server: Server) -> None:
    client = server.client()
    whole = client.completions.create(model="tiny", prompt="A ", max_tokens=12, seed=1)
    assert whole.usage is not None and whole.usage.completion_tokens <= 12
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt="A ",
            max_tokens=12,
            seed=1,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage is not None and not chunks[-1].choices
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])


def test_a_chat_whole_and_streamed(smol: Server) -> None:
    client = smol.client()
    whole = client.chat.completions.create(
        model="smol", messages=MESSAGES, max_tokens=16, temperature=0, logprobs=True,
        top_logprobs=2,
    )  # fmt: skip
    choice = whole.choices[0]
    assert choice.message.content and choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert whole.usage is not None
    # the token that ended the answer is scored too
    assert len(choice.logprobs.content) == whole.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 2 for entry in choice.logprobs.content)
    chunks: Any = list(
        client.chat.completions.create(
            model="smol", messages=MESSAGES, max_tokens=16, temperature=0, stream=True
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == choice.message.content


def test_structured_output(smol: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = smol.client().chat.completions.create(
        model="smol",
        messages=[{"role": "user", "content": "Name a city as JSON."}],
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert answer.choices[0].finish_reason == "stop"
    assert json.loads(answer.choices[0].message.content or "").keys() == {"city"}


def test_a_required_tool_is_called(smol: Server) -> None:
    parameters = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
    asked = {
        "model": "smol",
        "messages": [{"role": "user", "content": "Weather in Paris?"}],
        "tools": tools,
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 60,
    }
    client = smol.client()
    whole = client.chat.completions.create(**asked).choices[0]  # type: ignore[call-overload]
    assert whole.finish_reason == "tool_calls"
    call = whole.message.tool_calls[0].function
    assert call.name == "weather"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    stream = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    deltas = [chunk.choices[0].delta for chunk in stream]
    parts = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert parts[0].function.name == "weather" and parts[0].id
    arguments = "".join(part.function.arguments or "" for part in parts)
    assert json.loads(arguments)["city"] in ("Paris", "Rome")


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"n": 10**9}, 400, "n"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"extra_body": {"temprature": 1}}, 400, None),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, 400, "chat_template"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
        ({"tool_choice": "required"}, 400, "tool_choice"),
    ],
)
def test_errors_name_the_field(
    server: Server, fields: dict[str, object], status: int, param: str | None
) -> None:
    asked: Any = {"model": "tiny", "messages": MESSAGES} | fields
    with pytest.raises(openai.APIStatusError) as caught:
        server.client().chat.completions.create(**asked)
    assert caught.value.status_code == status
    assert (caught.value.param or "").partition(".")[0] == (param or "")
