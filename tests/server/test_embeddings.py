"""/v1/embeddings, with OpenAI's own client."""

import base64
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from pellucid import LLM, PoolingParams
from tests.engine.conftest import HIDDEN
from tests.server.conftest import Server
from tests.server.raw_http import connect, metric, post, request, running, wait_until

TEXTS = ["The capital of France", "A", "is a town that one cannot see from here", "A"]


@pytest.fixture(scope="module")
def local(tiny_model: Path) -> LLM:
    """The model of the server, in this process."""
    return LLM(tiny_model)


def embed(server: Server, inputs: Any, **fields: Any) -> Any:
    """The client's answer; fields that it does not know go into extra_body."""
    known = {"dimensions", "encoding_format", "user", "model"}
    given: Any = {"model": "tiny"} | {k: v for k, v in fields.items() if k in known}
    extra = {k: v for k, v in fields.items() if k not in known}
    return server.client().embeddings.create(input=inputs, **given, extra_body=extra)


def vectors(answer: Any) -> np.ndarray:
    assert [entry.index for entry in answer.data] == list(range(len(answer.data)))
    assert {entry.object for entry in answer.data} == {"embedding"}
    return np.array([entry.embedding for entry in answer.data])


def refusal(server: Server, inputs: Any, **fields: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        embed(server, inputs, **fields)
    return caught.value


@pytest.mark.parametrize("form", ["base64", "float", None])
def test_every_form_of_input_gives_the_bits_of_llm_embed(
    server: Server, local: LLM, form: str | None
) -> None:
    """The client asks for base64 by itself, and decodes it."""
    options = {} if form is None else {"encoding_format": form}
    expected = np.array([o.outputs.embedding for o in local.embed(TEXTS, use_tqdm=False)])
    ids = [local.tokenizer.encode(text) for text in TEXTS]
    for inputs in (TEXTS, ids):
        answer = embed(server, inputs, **options)
        if form == "base64":  # what the client was asked for by name is not decoded
            found = [np.frombuffer(base64.b64decode(e.embedding), "<f4") for e in answer.data]
            np.testing.assert_array_equal(np.array(found), expected)
        else:
            np.testing.assert_array_equal(vectors(answer), expected)
        assert answer.object == "list" and answer.model == "tiny"
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
    if form != "base64":
        for one in (TEXTS[0], ids[0]):
            np.testing.assert_array_equal(vectors(embed(server, one, **options))[0], expected[0])


def test_pooling_dimensions_and_truncation(server: Server, local: LLM) -> None:
    fields: dict[str, Any] = {
        "pooling": "mean",
        "dimensions": 7,
        "normalize": False,
        "truncate_prompt_tokens": 5,
    }
    (expected,) = local.embed(TEXTS[0], PoolingParams(**fields), use_tqdm=False)
    answer = embed(server, TEXTS[0], user="me", **fields)
    np.testing.assert_array_equal(vectors(answer)[0], expected.outputs.embedding)
    assert answer.usage.prompt_tokens == 5


@pytest.mark.parametrize(
    ("inputs", "fields", "param", "said"),
    [
        ("", {}, "input", "input is empty"),
        ([], {}, "input", "input is empty"),
        (["a", ""], {}, "input", "input is empty"),
        ("a", {"dimensions": HIDDEN + 1}, "dimensions", f"have {HIDDEN} numbers"),
        ("a", {"dimensions": 0}, "dimensions", "dimensions is 0; it must be"),
        ("a", {"pooling": "cls"}, "pooling", "pooling is 'cls'; it must be one of: last, mean"),
        ("a", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "is 0"),
        ("a", {"encoding_format": "hex"}, "encoding_format", "'hex'"),
        ("a", {"poling": "last"}, None, "did you mean 'pooling'"),
        ([[1, 2], [3, 99_999]], {}, "input", "outside the vocabulary"),
        (["a"] * 2049, {}, "input", "input has 2049 entries; this server allows at most 2048"),
        (["a", "x" * 3000], {}, "input", "tokens; it must be at most 2048"),
    ],
)
def test_what_is_refused(
    server: Server, inputs: Any, fields: dict[str, Any], param: str | None, said: str
) -> None:
    error = refusal(server, inputs, **fields)
    assert error.status_code == 400 and said in str(error)
    assert error.param == param


def test_a_prompt_that_is_too_long_has_openais_code_and_its_index(server: Server) -> None:
    """Nothing is cut unless it is asked for."""
    error = refusal(server, ["a", "x" * 2049])
    assert error.code == "context_length_exceeded" and error.param == "input"
    assert "input[1] has 2049 tokens; it must be at most 2048" in str(error)
    answer = embed(server, "x" * 2048)
    assert answer.usage.prompt_tokens == 2048
    answer = embed(server, ["a", "x" * 2049], truncate_prompt_tokens=-1)
    assert answer.usage.prompt_tokens == 2049


def test_another_model_is_not_served(server: Server) -> None:
    error = refusal(server, "a", model="text-embedding-3-small")
    assert error.status_code == 404 and error.code == "model_not_found"


def test_embeddings_and_answers_at_once(server: Server, local: LLM) -> None:
    expected = [o.outputs.embedding for o in local.embed(TEXTS, use_tqdm=False)]
    found: list[Any] = []

    def ask() -> None:
        found.append(vectors(embed(server, TEXTS)))

    stream = server.client().completions.create(
        model="tiny", prompt="A ", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in stream:
        pass
    for thread in threads:
        thread.join()
    assert len(found) == 6
    for vector in found:
        np.testing.assert_array_equal(vector, expected)


def test_a_client_that_leaves_frees_its_blocks(endless: Server) -> None:
    body = {"input": ["x" * 400_000] * 3, "pooling": "mean"}  # it would take minutes
    with connect(endless.url) as connection:
        connection.sendall(request("POST", "/v1/embeddings", json.dumps(body).encode()))
        wait_until(lambda: len(running(endless.url)) > 0)
    wait_until(lambda: running(endless.url) == [])
    assert metric(endless.url, "kv_cache_usage_perc") == 0
    assert metric(endless.url, "num_http_requests") == 0


def test_embeddings_are_counted(server: Server) -> None:
    names = ("request_prompt_tokens_sum", "e2e_request_latency_seconds_count")
    before = [metric(server.url, name) for name in names]
    of_answers = ("request_generation_tokens_count", "time_to_first_token_seconds_count")
    answers = [metric(server.url, name) for name in of_answers]
    embed(server, ["four", "four"])
    after = [metric(server.url, name) for name in names]
    assert [a - b for a, b in zip(after, before, strict=True)] == [8, 2]
    assert [metric(server.url, name) for name in of_answers] == answers


def test_a_key_is_needed_where_the_server_has_one(locked: Server) -> None:
    assert post(locked.url, "/v1/embeddings", {"input": "a"}).status == 401
    answer = post(locked.url, "/v1/embeddings", {"input": "a"}, "Authorization: Bearer secret")
    assert answer.status == 200 and len(json.loads(answer.body)["data"]) == 1
