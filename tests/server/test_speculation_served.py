"""Drafts behind HTTP, with OpenAI's client: streams, stop strings, usage, timings, metrics, and
clients that leave. Every draft is verified, so that steps give several tokens on any machine.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, CompletionOutput, SamplingParams
from tests.server.conftest import Server, serving
from tests.server.raw_http import connect, metric, request, running, wait_until

# `pellucid`, with a governor that verifies all
PROGRAM = """
from pellucid.speculative import speculation
from pellucid.speculative.governor import VerifyAll
speculation.Governor = lambda *_: VerifyAll()
from pellucid.cli.main import main
main()
"""
PROMPT = "abcabcabcabcabc"
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0, "max_tokens": 60, "logprobs": 2},
    "sampled": {"temperature": 0.7, "seed": 5, "max_tokens": 60, "top_p": 0.9, "logprobs": 0},
    "several": {"temperature": 0.9, "seed": 3, "max_tokens": 40, "n": 3, "logprobs": 1},
    # of the letters alone, so the stop string soon comes, mostly among accepted drafts
    "stopped": {"temperature": 0.5, "seed": 1, "max_tokens": 60, "stop": ["bab", "cca"],
                "logit_bias": {"97": 20.0, "98": 19.5, "99": 19.0}},
}  # fmt: skip


@pytest.fixture(scope="module")
def drafting(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model, named "tiny"; all drafts of n-grams are verified."""
    log = tmp_path_factory.mktemp("speculation") / "server.log"
    options = ("--served-model-name", "tiny", "--speculative", "ngram", "--metrics-aliases", "vllm")
    with serving(tiny_model, log, *options, program=("-c", PROGRAM)) as running:
        yield running


@pytest.fixture(scope="module")
def plain(tiny_model: Path) -> Iterator[LLM]:
    """The same model in this process, without drafts."""
    with LLM(tiny_model, speculative=None) as llm:
        yield llm


def expected(plain: LLM, body: dict[str, Any]) -> list[CompletionOutput]:
    fields = {**body, "logit_bias": {int(k): v for k, v in body.get("logit_bias", {}).items()}}
    [output] = plain.generate(PROMPT, SamplingParams(**fields), use_tqdm=False)
    return output.outputs


@pytest.mark.parametrize("kind", BODIES)
def test_a_stream_has_the_answer_without_drafts(drafting: Server, plain: LLM, kind: str) -> None:
    body = BODIES[kind]
    right = expected(plain, body)
    stream = drafting.client().completions.create(
        model="tiny", prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **body
    )
    texts, tokens = [""] * len(right), [0] * len(right)
    reasons: dict[int, str] = {}
    most, usage = 0, None
    timings: dict[str, Any] = {}
    for event in stream:
        for choice in event.choices:
            texts[choice.index] += choice.text
            if choice.logprobs is not None:
                tokens[choice.index] += len(choice.logprobs.tokens or ())
                most = max(most, len(choice.logprobs.tokens or ()))
            if choice.finish_reason is not None:
                reasons[choice.index] = choice.finish_reason
        usage = event.usage or usage
        timings = (event.model_extra or {}).get("timings") or timings
    assert texts == [completion.text for completion in right]
    assert [reasons[i] for i in range(len(right))] == [c.finish_reason for c in right]
    num_tokens = [len(completion.token_ids) for completion in right]
    assert usage is not None and usage.completion_tokens == sum(num_tokens)
    assert usage.prompt_tokens == len(PROMPT) and usage.total_tokens == sum(num_tokens) + 15
    if "logprobs" in body:
        assert tokens == num_tokens
    if kind == "greedy":
        assert most > 1  # several tokens of one step in one event
    assert timings["draft_n"] >= timings["draft_n_accepted"] >= 0 and timings["draft_n"] > 0
    assert timings["predicted_n"] == sum(num_tokens)


@pytest.mark.parametrize("kind", BODIES)
def test_an_answer_is_that_without_drafts(drafting: Server, plain: LLM, kind: str) -> None:
    right = expected(plain, BODIES[kind])
    answer = drafting.client().completions.create(model="tiny", prompt=PROMPT, **BODIES[kind])
    assert [choice.text for choice in answer.choices] == [c.text for c in right]
    assert [choice.finish_reason for choice in answer.choices] == [c.finish_reason for c in right]
    for choice, completion in zip(answer.choices, right, strict=True):
        if choice.logprobs is not None:
            chosen = [
                row[token_id].logprob
                for row, token_id in zip(
                    completion.logprobs or (), completion.token_ids, strict=True
                )
            ]
            assert choice.logprobs.token_logprobs == pytest.approx(chosen, abs=1e-6)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == sum(len(c.token_ids) for c in right)


def test_a_stop_string_ends_inside_accepted_drafts(drafting: Server, plain: LLM) -> None:
    """One request after the other, with a stop string that its plain answer has in its middle."""
    body = BODIES["greedy"]
    [whole] = expected(plain, body)
    inside = 0
    for at in range(5, 40, 3):
        stop = whole.text[at : at + 2]
        if not stop.isascii() or stop in whole.text[: at + 1]:
            continue
        [right] = expected(plain, body | {"stop": stop})
        before = metric(drafting.url, "spec_decode_num_accepted_tokens_total")
        answer = drafting.client().completions.create(
            model="tiny", prompt=PROMPT, **body, stop=stop
        )
        accepted = metric(drafting.url, "spec_decode_num_accepted_tokens_total") - before
        assert answer.choices[0].text == right.text
        assert answer.choices[0].finish_reason == right.finish_reason == "stop"
        assert answer.usage is not None
        assert answer.usage.completion_tokens == len(right.token_ids)
        inside += accepted > 0
    assert inside  # or nothing was shown


def test_metrics_have_vllms_names_and_add_up(drafting: Server) -> None:
    names = (
        *("spec_decode_num_drafts_total", "spec_decode_num_draft_tokens_total"),
        "spec_decode_num_accepted_tokens_total",
    )
    before = [metric(drafting.url, name) for name in names]
    answer = drafting.client().completions.create(
        model="tiny", prompt=PROMPT, max_tokens=60, temperature=0
    )
    timings = (answer.model_extra or {})["timings"]
    drafts, drafted, accepted = (
        metric(drafting.url, name) - value for name, value in zip(names, before, strict=True)
    )
    assert drafted == timings["draft_n"] >= drafts > 0
    assert accepted == timings["draft_n_accepted"]


def test_a_client_that_leaves_in_the_middle_of_drafts_disturbs_nobody(
    drafting: Server, plain: LLM
) -> None:
    long = {"prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "stream": True}
    [right] = expected(plain, BODIES["greedy"])
    for _ in range(5):
        with connect(drafting.url, receive_buffer=4096) as connection:
            connection.sendall(request("POST", "/v1/completions", json.dumps(long).encode()))
            assert b"200 OK" in connection.recv(4096)
        answer = drafting.client().completions.create(
            model="tiny", prompt=PROMPT, **BODIES["greedy"]
        )
        assert answer.choices[0].text == right.text
    wait_until(lambda: running(drafting.url) == [])
    assert metric(drafting.url, "kv_cache_usage_perc") == 0
