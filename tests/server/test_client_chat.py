"""OpenAI's own client: chats, whole and streamed, tools, many at once, and the tokenizer."""

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.server.conftest import Server
from tests.server.raw_http import post

HELLO = [{"role": "user", "content": "Say hello."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {"name": "clock", "parameters": {"type": "object", "properties": {},
                                                 "additionalProperties": False}},
}  # fmt: skip
BROKEN: dict[str, Any] = {
    "type": "function", "function": {"name": "broken", "parameters": {"type": "nothing"}}
}  # fmt: skip
EXTRA = {"priority", "cache_salt", "return_token_ids", "prompt_logprobs", "chat_template_kwargs",
         "continue_final_message", "add_generation_prompt", "structured_outputs", "top_k",
         "include_reasoning", "ignore_eos", "chat_template", "anything"}  # fmt: skip


def ask(server: Server, **fields: Any) -> Any:
    """A chat with the server's model."""
    extra = {name: fields.pop(name) for name in EXTRA & fields.keys()}
    name = "smol" if "smol" in str(server.log) else "tiny"
    asked: Any = {"model": name, "messages": HELLO, "max_tokens": 12, "temperature": 0} | fields
    return server.client().chat.completions.create(**asked, extra_body=extra)


def content(chunks: Any) -> str:
    """The text of a stream with one answer."""
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


@pytest.mark.parametrize("n", [1, 3])
def test_several_answers(smol: Server, n: int) -> None:
    answer = ask(smol, n=n, temperature=1.0, seed=5)
    assert [choice.index for choice in answer.choices] == list(range(n))
    found = [""] * n
    for chunk in ask(smol, n=n, temperature=1.0, seed=5, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    assert found == [choice.message.content for choice in answer.choices]


@pytest.mark.parametrize("top", [None, 0, 3, 20])
def test_logprobs(smol: Server, top: int | None) -> None:
    asked: dict[str, Any] = {"logprobs": True} | ({} if top is None else {"top_logprobs": top})
    answer = ask(smol, **asked)
    entries = answer.choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == (top or 0) for entry in entries)
    data = b"".join(bytes(entry.bytes) for entry in entries if entry.bytes)
    assert data.decode(errors="ignore").startswith(answer.choices[0].message.content[:5])
    streamed = [
        entry.logprob
        for chunk in ask(smol, **asked, stream=True)
        for choice in chunk.choices if choice.logprobs
        for entry in choice.logprobs.content
    ]  # fmt: skip
    assert streamed == [entry.logprob for entry in entries]


def test_candidates_that_are_ruled_out_are_no_broken_json(smol: Server) -> None:
    """A token that may not come has the logprob -inf, which JSON does not know."""
    for is_stream in (False, True):
        body = {"model": "smol", "messages": HELLO, "max_tokens": 5, "logprobs": True,
                "top_logprobs": 20, "stream": is_stream, "prompt_logprobs": 2,
                "structured_outputs": {"choice": ["yes"]}}  # fmt: skip
        answer = post(smol.url, "/v1/chat/completions", body)
        assert answer.status == 200
        assert b"Infinity" not in answer.body and b"NaN" not in answer.body


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_tools_may_be_left_alone(smol: Server, choice: str) -> None:
    answer = ask(smol, tools=[WEATHER, CLOCK], tool_choice=choice)
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    if choice == "none":
        assert message.tool_calls is None
    streamed = list(ask(smol, tools=[WEATHER, CLOCK], tool_choice=choice, stream=True))
    assert content(streamed) == (message.content or "")


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"weather", "clock"}),
        ({"type": "function", "function": {"name": "clock"}}, {"clock"}),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}),
    ],
)
def test_a_tool_is_called(smol: Server, choice: Any, names: set[str]) -> None:
    asked: dict[str, Any] = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 80,
                             "parallel_tool_calls": False}  # fmt: skip
    whole = ask(smol, **asked).choices[0]
    assert whole.finish_reason == "tool_calls"
    (call,) = whole.message.tool_calls
    assert call.function.name in names and isinstance(json.loads(call.function.arguments), dict)
    chunks = [c.choices[0] for c in ask(smol, **asked, stream=True)]
    deltas = [d for c in chunks for d in c.delta.tool_calls or []]
    assert deltas[0].function.name == call.function.name and deltas[0].id
    assert "".join(d.function.arguments or "" for d in deltas) == call.function.arguments
    assert chunks[-1].finish_reason == "tool_calls"


def test_the_result_of_a_tool_is_read(smol: Server) -> None:
    call = {"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    messages = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}]  # fmt: skip
    assert ask(smol, messages=messages, tools=[WEATHER]).choices[0].message.content is not None


def test_json_objects(smol: Server) -> None:
    choice = ask(smol, response_format={"type": "json_object"}, max_tokens=100).choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.finish_reason == "length"


def test_text_as_a_format(smol: Server) -> None:
    text = ask(smol, response_format={"type": "text"}).choices[0].message.content
    assert text == ask(smol).choices[0].message.content


def test_a_stop_string(smol: Server) -> None:
    text = ask(smol).choices[0].message.content
    stop = text.split()[1]
    choice = ask(smol, stop=stop).choices[0]
    assert choice.message.content == text[: text.index(stop)] and choice.finish_reason == "stop"
    assert content(ask(smol, stop=[stop], stream=True)) == choice.message.content


def test_usage(smol: Server) -> None:
    usage = ask(smol, ignore_eos=True).usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    *others, last = ask(smol, ignore_eos=True, stream=True, stream_options={"include_usage": True})
    assert last.usage.completion_tokens == 12 and last.choices == []
    assert all(chunk.usage is None for chunk in others)


def test_both_names_of_the_longest_answer(smol: Server) -> None:
    for name in ("max_tokens", "max_completion_tokens"):
        asked = {"max_tokens": openai.NOT_GIVEN} | {name: 3}
        assert ask(smol, ignore_eos=True, **asked).usage.completion_tokens == 3


def test_token_ids_are_returned(smol: Server) -> None:
    answer = ask(smol, return_token_ids=True)
    ids = answer.choices[0].token_ids
    assert len(ids) == answer.usage.completion_tokens
    streamed = [i for c in ask(smol, return_token_ids=True, stream=True) for x in c.choices
                for i in (x.model_extra or {}).get("token_ids") or []]  # fmt: skip
    assert streamed == ids


def test_the_prompt_is_scored(smol: Server) -> None:
    answer = ask(smol, prompt_logprobs=1)
    rows = answer.prompt_logprobs
    assert rows[0] is None and len(rows) == answer.usage.prompt_tokens
    assert all(len(row) in (1, 2) for row in rows[1:])


def test_fields_of_other_servers(smol: Server) -> None:
    plain = ask(smol).choices[0].message.content
    fields = {"priority": 3, "cache_salt": "tenant", "chat_template_kwargs": {"any": 1},
              "include_reasoning": False, "anything": [1], "user": "u"}  # fmt: skip
    assert ask(smol, **fields).choices[0].message.content == plain


def test_a_message_is_continued(smol: Server) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "The first three letters are A, B,"}]
    fields: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    answer = ask(smol, messages=messages, **fields)
    rest = answer.choices[0].message.content
    assert rest != ask(smol).choices[0].message.content and "C" in rest


def test_parts_of_text_are_one_text(smol: Server) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]
    answer = ask(smol, messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content


def test_many_at_once(smol: Server) -> None:
    """32 requests of the asynchronous client: each has the answer that it has alone."""

    async def run() -> list[str]:
        options: dict[str, Any] = {"api_key": "none", "max_retries": 0, "timeout": 600}
        async with openai.AsyncOpenAI(base_url=f"{smol.url}/v1", **options) as client:

            async def one(i: int) -> str:
                asked: Any = {"model": "smol", "max_tokens": 8, "temperature": 0,
                              "messages": [{"role": "user", "content": f"Count from {i % 8}."}],
                              "stream": i % 2 == 0}  # fmt: skip
                answer = await client.chat.completions.create(**asked)
                if i % 2:
                    return answer.choices[0].message.content or ""
                return "".join([c.choices[0].delta.content or "" async for c in answer])

            return await asyncio.gather(*map(one, range(32)))

    found = asyncio.run(run())
    assert all(found)
    assert all(found[i] == found[i % 8] for i in range(32))


def test_a_client_breaks_off_a_stream(smol: Server) -> None:
    stream = ask(smol, max_tokens=500, ignore_eos=True, stream=True)
    next(iter(stream))
    stream.close()
    assert ask(smol).choices[0].message.content


@pytest.mark.parametrize("text", ["Hello", "Füße 🙂 <|im_end|>", " a\n\tb", "\0"])
def test_tokens_and_back(smol: Server, text: str) -> None:
    found = json.loads(
        post(smol.url, "/tokenize", {"prompt": text, "add_special_tokens": False}).body
    )
    assert found["count"] == len(found["tokens"]) > 0
    back = json.loads(post(smol.url, "/detokenize", {"tokens": found["tokens"]}).body)
    assert back["prompt"] == text


def test_the_tokens_of_a_chat(smol: Server) -> None:
    body = {"messages": HELLO, "return_token_strs": True}
    found = json.loads(post(smol.url, "/tokenize", body).body)
    assert found["count"] == ask(smol).usage.prompt_tokens
    assert len(found["token_strs"]) == found["count"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [1]}, "messages"),
        ({"messages": [{}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": 5, "content": "a"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages"),
        ({"messages": HELLO * 3000}, "messages"),
        ({"tools": [{}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0]"),
        ({"tools": [WEATHER] * 200}, "tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {
            "type": "nothing"}}}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": 5}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"tools": [BROKEN], "tool_choice": "required"}, "tools"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_stream", [False, True])
def test_what_is_wrong_is_named(
    server: Server, fields: dict[str, Any], param: str, is_stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, **fields, stream=is_stream)
    assert caught.value.status_code == 400
    assert (caught.value.param or "").split(".")[0] == param, caught.value
    assert len(caught.value.message) < 1500
