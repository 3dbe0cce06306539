"""Server-sent events cut anywhere, and the tokens of chunks as servers send them."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.measure.load_stream import Answer, EventReader, StreamError, error_sentence


def read(data: bytes, cuts: list[int]) -> list[str]:
    reader, found = EventReader(), []
    ends = [*sorted(cuts), len(data)]
    for start, end in zip([0, *ends], ends, strict=False):
        found += reader.feed(data[start:end])
    return found + reader.end()


STREAM = 'data: {"a": "é"}\n\n: ping\n\ndata:two\r\ndata: lines\r\n\r\n'
STREAM += "event: x\rdata: cr\r\rdata: [DONE]"

EVENTS = ['{"a": "é"}', "two\nlines", "cr", "[DONE]"]


def test_events_are_the_same_wherever_their_bytes_are_cut() -> None:
    data = STREAM.encode()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1, 7):
            assert read(data, [first, second]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM.encode()))))
def test_events_are_the_same_however_often_they_are_cut(cuts: list[int]) -> None:
    assert read(STREAM.encode(), cuts) == EVENTS


def test_an_event_without_end_is_refused_and_not_kept() -> None:
    reader = EventReader()
    with pytest.raises(StreamError, match="more than 4194304 bytes"):
        for _ in range(100):
            reader.feed(b"x" * 100_000)


def answer(*chunks: dict[str, Any] | str, times: list[float] | None = None) -> Answer:
    """The answer of chunks that came one second after another."""
    found = Answer()
    for i, chunk in enumerate(chunks):
        text = chunk if isinstance(chunk, str) else json.dumps(chunk)
        found.take(text, float(i) if times is None else times[i])
    found.finish()
    return found


def chat(content: str | None, reason: str | None = None, **extra: Any) -> dict[str, Any]:
    delta = {} if content is None else {"content": content}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}], **extra}


def text(text: str, reason: str | None = None, **extra: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason}], **extra}


def usage(completion: int, prompt: int = 7) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": prompt, "completion_tokens": completion}}


ROLE = {"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}


def test_a_chunk_with_only_the_role_is_not_the_first_token() -> None:
    found = answer(ROLE, chat("a"), chat("b"), chat(None, "length"), {"choices": [], **usage(2)})
    assert (found.times, found.counts, found.num_tokens) == ([1.0, 2.0], [1, 1], 2)
    assert found.prompt_tokens == 7 and found.finish_reason == "length"


def test_thoughts_and_tool_calls_are_tokens() -> None:
    call = {"choices": [{"delta": {"tool_calls": [{"function": {"arguments": "{"}}]}}]}
    thought = {"choices": [{"delta": {"reasoning_content": "hm"}}]}
    assert answer(ROLE, thought, call, chat(None, "stop"), "[DONE]").times == [1.0, 2.0]


def test_tokens_of_a_chunk_follow_its_share_of_the_text() -> None:
    found = answer(text("a"), text("bcdefgh"), text("ij", "length"), {"choices": [], **usage(10)})
    assert found.counts == [1, 6, 3] and sum(found.counts) == found.num_tokens == 10


def test_the_usage_of_each_chunk_tells_its_tokens() -> None:
    found = answer(text("a", **usage(2)), text("b", **usage(3)), text("c", "length", **usage(6)))
    assert (found.times, found.counts) == ([0.0, 1.0, 2.0], [2, 1, 3])


def test_a_usage_with_the_last_chunk_alone_is_that_of_the_whole_answer() -> None:
    # as llama-server: the reason and the usage come together
    found = answer(text("a"), text("b"), text("c"), text("", "length", **usage(3)))
    assert (found.times, found.counts) == ([0.0, 1.0, 2.0], [1, 1, 1])


def test_the_end_of_sequence_is_a_token_that_came_with_the_reason() -> None:
    found = answer(text("a"), text("b"), text("", "stop", **usage(3)))
    assert (found.times, found.counts) == ([0.0, 1.0, 2.0], [1, 1, 1])


def test_tokens_that_have_no_text_come_with_the_reason() -> None:
    found = answer(text("", "length", **usage(4)))
    assert (found.times, found.counts, found.num_tokens) == ([0.0], [4], 4)


def test_an_empty_answer_has_no_token() -> None:
    found = answer(text("", "stop", **usage(0)))
    assert (found.times, found.num_tokens) == ([], 0)


def test_logprobs_tell_the_tokens_of_a_chunk() -> None:
    rows = [{"token": "a"}, {"token": "b"}]
    first = {"choices": [{"delta": {"content": "ab"}, "logprobs": {"content": rows}}]}
    second = {"choices": [{"text": "c", "logprobs": {"tokens": ["c"]}, "finish_reason": "stop"}]}
    assert answer(first, second, {"choices": [], **usage(3)}).counts == [2, 1]


def test_without_usage_each_chunk_is_one_token() -> None:
    found = answer(text("a"), text("long text"), text("", "length"))
    assert (found.counts, found.num_tokens, found.completion_tokens) == ([1, 1], 2, None)


def test_a_stream_that_ends_without_done_or_reason_broke_off() -> None:
    with pytest.raises(StreamError, match="ended after 1 chunks"):
        answer(text("a"))
    assert answer(text("a"), "[DONE]").num_tokens == 1


@pytest.mark.parametrize(
    "chunk",
    [{"error": {"message": "out of memory"}}, {"object": "error", "message": "out of memory"}],
)
def test_an_error_in_the_stream_is_a_failure_with_its_sentence(chunk: dict[str, Any]) -> None:
    with pytest.raises(StreamError, match=r"^out of memory$") as raised:
        answer(text("a"), chunk)
    assert raised.value.kind == "error in the stream"


@pytest.mark.parametrize("data", ["<html>", "[]", '"a"', "{", "[" * 100_000])
def test_an_event_that_is_no_json_object_is_a_failure(data: str) -> None:
    with pytest.raises(StreamError, match="an event is"):
        answer(data)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "delta",
                        "usage",
                        "text",
                        "content",
                        "tool_calls",
                        "error",
                        "logprobs",
                        "completion_tokens",
                        "finish_reason",
                        "function",
                    ]
                ),
                inner,
            )
        ),
    )
)
def test_any_json_is_taken_or_refused_with_a_sentence(value: Any) -> None:
    try:
        answer(json.dumps(value), json.dumps({"choices": [value]}), "[DONE]")
    except StreamError as error:
        assert str(error)


@pytest.mark.parametrize("value", [True, 1, 1.5, "a", None, [], [None], [1], {}, {"a": 1}])
def test_any_value_may_stand_in_any_field(value: Any) -> None:
    function = {"function": value}
    for delta in (value, *({name: value} for name in ("content", "tool_calls", "reasoning"))):
        answer(json.dumps({"choices": [{"delta": delta}]}), "[DONE]")
    for calls in ([value], [function], function):
        answer(json.dumps({"choices": [{"delta": {"tool_calls": calls}}]}), "[DONE]")
    for name in ("text", "logprobs", "finish_reason"):
        answer(json.dumps({"choices": [{name: value}]}), "[DONE]")
    for name in ("content", "tokens"):
        answer(json.dumps({"choices": [{"logprobs": {name: value}}]}), "[DONE]")
    for name in ("prompt_tokens", "completion_tokens", "prompt_tokens_details"):
        answer(json.dumps({"usage": {name: value}}), "[DONE]")


@pytest.mark.parametrize(
    "body",
    [
        {"error": {"message": "too long", "code": 400}},
        {"error": "too long"},
        {"detail": "too long"},
        {"detail": [{"msg": "too long"}]},
        {"object": "error", "message": "too long"},
    ],
)
def test_the_sentence_of_an_error_is_found_in_every_form(body: dict[str, Any]) -> None:
    assert "too long" in error_sentence(body)
