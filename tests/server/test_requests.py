"""What requests ask for and what answers hold, with OpenAI's client, sync and async."""

import asyncio
import json
from collections.abc import Mapping
from typing import Any

import openai
import pytest

from tests.server.conftest import START_SECONDS, Server

MESSAGES: Any = [{"role": "user", "content": "Hello"}]
FIXED: Any = {"model": "tiny", "max_tokens": 6, "temperature": 0}
# what an answer must not depend on
LONELY = {"extra_body": {"cache_salt": "of its own"}}


def complete(server: Server, prompt: Any = "A ", **fields: Any) -> Any:
    return server.client().completions.create(prompt=prompt, **{**FIXED, **fields})


def chat(server: Server, messages: Any = MESSAGES, **fields: Any) -> Any:
    return server.client().chat.completions.create(messages=messages, **{**FIXED, **fields})


def test_an_echo_holds_the_prompt_and_its_tokens(server: Server) -> None:
    answer = complete(server, "Hello", echo=True, logprobs=1)
    choice = answer.choices[0]
    assert choice.text.startswith("Hello")
    told = choice.logprobs
    assert told.tokens[:5] == list("Hello") and told.text_offset[:6] == [0, 1, 2, 3, 4, 5]
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(value <= 0 for value in told.token_logprobs[1:])
    assert len(told.tokens) == answer.usage.total_tokens


def test_an_echo_alone_scores_the_prompt_and_makes_nothing(server: Server) -> None:
    answer = complete(
        server, "Hello", echo=True, logprobs=0, max_tokens=0, extra_body={"return_token_ids": True}
    )
    choice = answer.choices[0]
    assert choice.text == "Hello" and choice.logprobs.tokens == list("Hello")
    assert answer.usage.completion_tokens == 0 and answer.usage.total_tokens == 5
    assert choice.token_ids == [] and choice.prompt_token_ids == list(b"Hello")


@pytest.mark.parametrize("prompt", ["abc", [97, 98, 99], ["abc"], [[97, 98, 99]]])
def test_a_prompt_in_each_form(server: Server, prompt: Any) -> None:
    answer = complete(server, prompt)
    assert answer.usage.prompt_tokens == 3
    assert answer.choices[0].text == complete(server, "abc", **LONELY).choices[0].text


def test_several_prompts_and_answers_have_their_places(server: Server) -> None:
    prompts = ["abc", "xyz", "123"]
    answer = complete(server, prompts, n=2)
    assert [choice.index for choice in answer.choices] == list(range(6))
    for i, prompt in enumerate(prompts):
        alone = complete(server, prompt).choices[0].text
        assert [answer.choices[2 * i + j].text for j in range(2)] == [alone, alone]
    streamed = [""] * 6
    for chunk in complete(server, prompts, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == [choice.text for choice in answer.choices]


def test_a_stream_of_logprobs_is_that_of_the_whole_answer(server: Server) -> None:
    whole = complete(server, logprobs=2).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in complete(server, logprobs=2, stream=True)]
    for name in ("tokens", "token_logprobs", "text_offset", "top_logprobs"):
        parts = [getattr(chunk, name) for chunk in chunks if chunk is not None]
        assert [value for part in parts for value in part] == getattr(whole, name)


def test_a_seed_gives_the_same_text_again(server: Server) -> None:
    texts = {complete(server, temperature=1, seed=5, max_tokens=20).choices[0].text for _ in "123"}
    assert len(texts) == 1
    answer = complete(server, temperature=1, seed=5, max_tokens=20, n=3)
    assert len({choice.text for choice in answer.choices}) > 1


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(server: Server, is_stream: bool) -> None:
    text = complete(server, max_tokens=8, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[3:5]
    asked: Any = {"max_tokens": 8, "stop": [stop], "extra_body": {"ignore_eos": True}}
    answer = complete(server, **asked, stream=is_stream)
    choices = [chunk.choices[0] for chunk in answer] if is_stream else answer.choices
    assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
    assert choices[-1].finish_reason == "stop" and choices[-1].stop_reason == stop


def test_a_stop_token_ends_the_answer(server: Server) -> None:
    extra = {"ignore_eos": True, "return_token_ids": True}
    token_ids = complete(server, extra_body=extra).choices[0].token_ids
    choice = complete(server, extra_body=extra | {"stop_token_ids": token_ids[2:3]}).choices[0]
    assert choice.finish_reason == "stop" and choice.stop_reason == token_ids[2]


@pytest.mark.parametrize(
    "extra", [{"top_k": 1}, {"min_p": 1.0}, {"allowed_token_ids": [65]}, {"typical_p": 1e-6}]
)
def test_sampling_fields_beyond_openai_are_used(server: Server, extra: dict[str, Any]) -> None:
    first = complete(server, temperature=1, seed=1, extra_body=extra).choices[0].text
    second = complete(server, temperature=1, seed=2, extra_body=extra).choices[0].text
    assert first == second


def test_a_bias_forces_a_token(server: Server) -> None:
    assert complete(server, logit_bias={"65": 100}).choices[0].text == "A" * 6


def test_the_cache_is_shared_within_a_salt_alone(server: Server) -> None:
    prompt = "The same beginning. " * 8

    def cached(salt: str) -> int:
        usage = complete(server, prompt, extra_body={"cache_salt": salt}).usage
        tokens: int = usage.prompt_tokens_details.cached_tokens
        return tokens

    assert [cached("a") > 0, cached("a") > 0, cached("b") > 0] == [False, True, False]


def test_timings_add_up(server: Server) -> None:
    answer = complete(server, "abc", **LONELY)
    told = answer.timings
    assert told["prompt_n"] + told["cache_n"] == 3
    assert told["predicted_n"] == answer.usage.completion_tokens
    assert min(told["prompt_ms"], told["predicted_ms"], told["queue_ms"]) >= 0


def test_prompt_logprobs_have_an_entry_per_token(server: Server) -> None:
    told = complete(server, "Hello", extra_body={"prompt_logprobs": 2}).choices[0].prompt_logprobs
    assert told[0] is None and len(told) == 5
    for row, character in zip(told[1:], "ello", strict=True):
        assert row[str(ord(character))]["decoded_token"] == character


def test_a_chat_in_parts_is_that_in_one_piece(server: Server) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert chat(server, parts).choices[0].message == chat(server).choices[0].message


@pytest.mark.parametrize("top", [0, 1, 5])
def test_chat_logprobs(server: Server, top: int) -> None:
    answer = chat(server, logprobs=True, top_logprobs=top)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0 and len(entry.top_logprobs) == top
    text = b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace")
    assert text.startswith(answer.choices[0].message.content)


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_limit(server: Server, name: str) -> None:
    client = server.client()
    answer: Any = client.chat.completions.create(
        model="tiny", messages=MESSAGES, temperature=0, extra_body={name: 3, "ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 3 and answer.choices[0].finish_reason == "length"


def test_usage_is_the_last_event_of_a_chat(server: Server) -> None:
    chunks = list(chat(server, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.prompt_tokens > 0
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_many_async_requests_answer_as_alone(server: Server) -> None:
    prompts = [f"number {i} " for i in range(24)]
    expected = [complete(server, prompt).choices[0].text for prompt in prompts]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=START_SECONDS
        ) as client:

            async def one(i: int) -> str:
                if i % 2:
                    answer = await client.completions.create(prompt=prompts[i], **FIXED)
                    return str(answer.choices[0].text)
                stream: Any = await client.completions.create(
                    prompt=prompts[i], stream=True, **FIXED
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*map(one, range(len(prompts)))))

    assert asyncio.run(ask()) == expected


def test_text_becomes_tokens_and_text_again(server: Server) -> None:
    client = server.client().with_options(base_url=server.url)
    told: Any = client.post("/tokenize", body={"prompt": "Hello"}, cast_to=object)
    assert told["tokens"] == list(b"Hello") and told["count"] == 5
    text: Any = client.post("/detokenize", body={"tokens": told["tokens"]}, cast_to=object)
    assert text == {"prompt": "Hello"}
    rendered: Any = client.post("/tokenize", body={"messages": MESSAGES}, cast_to=object)
    assert rendered["count"] > 5


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a" * (1 << 19) + "a"}, "prompt"),
        ("/detokenize", {"tokens": [1] * ((1 << 19) + 1)}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
    ],
)
def test_tokens_are_asked_within_limits(
    server: Server, path: str, body: Mapping[str, Any], param: str
) -> None:
    client = server.client().with_options(base_url=server.url)
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(path, body=body, cast_to=object)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("prompt", "fields", "param", "code"),
    [
        ("a", {"extra_body": {"cache_salt": "x" * 1000}}, "cache_salt", None),
        ("a", {"extra_body": {"priority": 10**12}}, "priority", None),
        ("a", {"logit_bias": {"9999999": 1}}, "logit_bias", None),
        ([10**6], {}, "prompt", None),
        ([-1], {}, "prompt", None),
        ("a" * 5000, {}, "prompt", "context_length_exceeded"),
        (["a", "a" * 5000], {}, "prompt", "context_length_exceeded"),
        ("", {}, "prompt", None),
        ("a", {"suffix": "b"}, "suffix", None),
        ("a", {"best_of": 3}, "best_of", None),
        ("a", {"logprobs": -1}, "logprobs", None),
        ("a", {"extra_body": {"prompt_logprobs": -1}}, "prompt_logprobs", None),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_of_the_engine_name_the_field(
    server: Server, prompt: Any, fields: Any, param: str, code: str | None, is_stream: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(server, prompt, stream=is_stream, **fields)
    assert caught.value.param == param
    if code is not None:
        assert caught.value.code == code


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "a" * 5000}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages"),
        ({"extra_body": {"chat_template_kwargs": {"tools": []}}}, "chat_template_kwargs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_errors_of_a_chat_name_the_field(server: Server, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(server, **fields)
    assert caught.value.param == param


def test_an_answer_is_json_without_spaces_and_numbers_are_finite(server: Server) -> None:
    raw = server.client().chat.completions.with_raw_response.create(
        messages=MESSAGES, logprobs=True, top_logprobs=20, **FIXED
    )

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    json.loads(raw.content, parse_constant=refuse)
