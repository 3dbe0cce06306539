"""What a load test sends: random prompts, lengths of a trace, lines of a file."""

import json
from pathlib import Path
from typing import Any

import pytest

from pellucid.errors import ConfigError, FormatError
from pellucid.measure.load_arrivals import TraceEntry
from pellucid.measure.load_client import check_url, encode_request
from pellucid.measure.load_workload import (
    CHAT,
    COMPLETIONS,
    file_workload,
    random_workload,
    trace_workload,
)


def words(text: str) -> list[str]:
    return text.split()


def test_random_prompts_have_the_lengths_that_were_asked_for() -> None:
    request = random_workload(COMPLETIONS, 20, 5).request(3)
    assert len(words(request.body["prompt"])) == request.input_length == 20
    assert request.body["max_tokens"] == request.output_length == 5


def test_lengths_are_spread_evenly_over_the_range() -> None:
    requests = [
        random_workload(COMPLETIONS, 10, 100, range_ratio=0.5).request(i) for i in range(600)
    ]
    assert {r.input_length for r in requests} == set(range(5, 16))
    outputs = [r.output_length or 0 for r in requests]
    assert min(outputs) >= 50 and max(outputs) <= 150
    assert sum(outputs) / len(outputs) == pytest.approx(100, abs=4)
    assert all(r.input_length == len(words(r.body["prompt"])) for r in requests)


def test_a_request_depends_on_seed_and_number_alone() -> None:
    one, same = random_workload(CHAT, 8, 4, seed=1), random_workload(CHAT, 8, 4, seed=1)
    assert one.request(5) == same.request(5)
    assert one.request(5) != one.request(6)
    assert one.request(5) != random_workload(CHAT, 8, 4, seed=2).request(5)


def test_prompts_share_the_prefix_that_was_asked_for_and_no_other() -> None:
    workload = random_workload(COMPLETIONS, 8, 4, prefix_length=16)
    first, second = (words(workload.request(i).body["prompt"]) for i in range(2))
    assert len(first) == 24 == workload.request(0).input_length
    assert first[:16] == second[:16] and first[16:] != second[16:]


def test_equal_hash_ids_of_a_trace_are_equal_text() -> None:
    trace = [
        TraceEntry(0.0, 1100, 3, (7, 8, 9)),
        TraceEntry(1.0, 600, 0, (7, 5)),
        TraceEntry(2.0, 4, 2),
    ]
    workload = trace_workload(COMPLETIONS, trace, seed=0)
    assert workload.count == 3
    first, second, third = (words(workload.request(i).body["prompt"]) for i in range(3))
    assert [len(first), len(second), len(third)] == [1100, 600, 4]
    assert first[:512] == second[:512] and first[512:600] != second[512:600]
    assert workload.request(1).body["max_tokens"] == 1  # servers refuse 0


def lines(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), "utf-8")
    return path


MESSAGES = [{"role": "user", "content": "Hi"}]


def test_the_forms_of_lines(tmp_path: Path) -> None:
    path = lines(
        tmp_path,
        {"prompt": "Once", "max_tokens": 20},
        "",
        {"messages": MESSAGES},
        {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
        {
            "custom_id": "a",
            "url": "/v1/completions",
            "body": {"prompt": [1, 2], "top_p": 0.5, "model": "x", "stream": False},
        },
    )
    workload = file_workload(CHAT, path, 33)
    first, second, third, fourth = (workload.request(i) for i in range(4))
    assert first.body == {"messages": [{"role": "user", "content": "Once"}], "max_tokens": 20}
    assert second.body == {"messages": MESSAGES, "max_tokens": 33}
    assert third.body["messages"] == [{"role": "user", "content": "Why?"}]
    assert (fourth.path, fourth.body) == (
        COMPLETIONS,
        {"prompt": [1, 2], "top_p": 0.5, "max_tokens": 33},
    )
    assert workload.request(4) == first  # again from the beginning


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("", "has no requests"),
        ("[1]", "is a JSON array"),
        ("{", "line 1 is not a JSON object"),
        ({"text": "a"}, "line 1 has none of: prompt"),
        ({"prompt": ""}, "line 1 has none of: prompt"),
        ({"prompt": "a", "max_tokens": "9"}, "line 1: max_tokens is '9'"),
        ({"prompt": "a", "output_tokens": 0}, "line 1: output_tokens is 0"),
        ({"url": "/v1/embeddings", "body": {}}, "url is '/v1/embeddings'"),
        ({"conversations": ["a"]}, "line 1 has none of"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, row: Any, sentence: str) -> None:
    with pytest.raises(FormatError, match=sentence):
        file_workload(CHAT, lines(tmp_path, row), 8)


def test_messages_need_the_chat_endpoint(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="need --endpoint chat"):
        file_workload(COMPLETIONS, lines(tmp_path, {"messages": MESSAGES}), 8)


def test_fields_of_the_body_are_replaced_and_removed() -> None:
    request = random_workload(COMPLETIONS, 2, 4).request(0)
    extra = {"temperature": 0, "max_tokens": None, "max_completion_tokens": 4}
    body = json.loads(encode_request(request, "m", ignore_eos=True, extra=extra))
    assert body.pop("prompt") == request.body["prompt"]
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
        "max_completion_tokens": 4,
    }


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://a/v1", "http://", "http://a:x/v1", "http://a/v1?b=1"]
)
def test_a_url_that_is_none_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="it must be like http://127"):
        check_url(url)


def test_a_url_is_that_of_the_server_and_not_of_an_endpoint() -> None:
    assert check_url("http://[::1]:8000/v1/") == "http://[::1]:8000/v1"
    with pytest.raises(ConfigError, match="leave out the endpoint"):
        check_url("http://a/v1/chat/completions")
