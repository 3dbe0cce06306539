"""Why a request took as long as it did, from its times and from ceilings that are round numbers."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.costs import StepShape
from pellucid.config import ModelConfig
from pellucid.formats.tensor import TensorSpec
from pellucid.measure.explain import Explainer, Ledger, explain_request
from pellucid.measure.hardware import Ceilings, Range
from pellucid.measure.roofline import ModelProgram, build_model_program, total
from pellucid.models.registry import get_graph
from pellucid.outputs import Explanation, RequestMetrics

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
)
RATE = Range(1e9, 1e9, 1e9, 1)
CEILINGS = Ceilings("a device", "measured", {1 << 30: RATE}, {"int8": 1e10, "float32": 1e10})


@pytest.fixture(scope="module")
def program() -> ModelProgram:
    specs: Mapping[str, TensorSpec] = {
        param.name: TensorSpec("Q8_0" if len(param.shape) == 2 else "F32", param.shape)
        for param in get_graph("llama").parameters(CONFIG)
    }
    return build_model_program(CONFIG, specs, NativeBackend(threads=1), ("f16", "f16"))


TIMES: dict[str, Any] = {
    "arrival_time": 0.0,
    "first_scheduled_time": 0.5,
    "first_token_time": 1.5,
    "last_token_time": 3.5,
}


def metrics(answer: int, cached: int = 0, others: int = 0, **times: Any) -> RequestMetrics:
    return RequestMetrics(
        num_prompt_tokens=300,
        num_cached_tokens=cached,
        num_output_tokens=answer,
        num_other_tokens=others,
        **times,
    )


@pytest.fixture(scope="module")
def ledger(program: ModelProgram) -> Ledger:
    return Ledger(program, CEILINGS)


def test_the_phases_are_told_with_what_binds_them(program: ModelProgram, ledger: Ledger) -> None:
    done = metrics(51, cached=100, **TIMES)
    found = explain_request(done, ledger, chunk=512)
    assert found.prefill is not None and found.decode is not None
    assert (found.prefill.num_tokens, found.prefill.seconds) == (200, 1.0)
    assert found.prefill.bound == "arithmetic"
    assert (found.decode.num_tokens, found.decode.seconds) == (50, 2.0)
    assert found.decode.roof_share is not None
    assert found.decode.bound == "memory" and found.bound == "memory"
    # nearly all of a step of decode is reading, at 1 GB/s
    moved = total(program.costs(StepShape((1,), (325,), 1))).bytes
    assert found.decode.roof_share == pytest.approx(50 * moved / 1e9 / 2.0, rel=0.1)
    assert found.prefill.roof_share is not None and found.share_of_ceiling is not None
    both = found.prefill.roof_share * 1.0 + found.decode.roof_share * 2.0
    assert found.share_of_ceiling == pytest.approx(both / 3.0)
    assert found.sentence.startswith("3.50 s: 57% decode (50 tokens), bound by memory and at ")
    assert "29% prefill (200 tokens, 100 more from the cache), bound by arithm" in found.sentence
    assert found.sentence.endswith("14% waiting in the queue")


def test_kinds_of_ops_add_up_to_all_entries(program: ModelProgram, ledger: Ledger) -> None:
    step = StepShape((7, 1), (50, 300), 2)
    least = 0.0
    for item, cost in zip(program.items, program.costs(step), strict=True):
        rate = CEILINGS.bandwidth_at(program.working_set(item, cost, step))
        least += max(cost.bytes / rate, CEILINGS.arithmetic_seconds(cost))
    assert sum(ledger.least_seconds([step])) == pytest.approx(least)


def test_drafts_are_counted(program: ModelProgram, ledger: Ledger) -> None:
    """50 tokens in 20 steps with 2.5 drafts each: the weights are read 20 times, for 3.5 rows."""
    done = metrics(51, cached=100, **TIMES)
    done.num_decode_steps, done.num_draft_tokens = 20, 50
    found = explain_request(done, ledger, chunk=512).decode
    assert found is not None and found.roof_share is not None and found.num_tokens == 50
    least = [sum(ledger.least_seconds([StepShape((rows,), (326,), rows)])) for rows in (3, 4)]
    assert found.roof_share == pytest.approx(20 * sum(least) / 2 / 2.0)


def test_the_queue_may_be_the_reason(ledger: Ledger) -> None:
    waited = TIMES | {"arrival_time": -9.5}
    found = explain_request(metrics(51, **waited), ledger, chunk=512)
    assert found.bound == "queue" and "13.00 s: 77% waiting in the queue" in found.sentence


def test_the_work_of_other_requests_is_told(ledger: Ledger) -> None:
    found = explain_request(metrics(51, others=350, **TIMES), ledger, chunk=512)
    told = "; 50% of the tokens computed meanwhile were of other requests"
    assert found.sentence.endswith(told)


def test_a_share_above_one_is_not_told_without_its_reason(ledger: Ledger) -> None:
    fast = {name: time / 1000 for name, time in TIMES.items()}
    found = explain_request(metrics(51, **fast), ledger, chunk=512)
    assert found.share_of_ceiling is not None and found.share_of_ceiling > 1
    assert "the machine was slower when `pellucid machine` measured it" in found.sentence


def test_an_answer_of_one_token_has_no_decode(ledger: Ledger) -> None:
    one = TIMES | {"last_token_time": 1.5}
    found = explain_request(metrics(1, **one), ledger, chunk=128)
    assert found.decode is None
    assert found.prefill is not None and found.prefill.num_tokens == 300


def test_a_request_without_a_token_tells_how_long_it_waited(ledger: Ledger) -> None:
    found = explain_request(metrics(0, arrival_time=0.0), ledger, chunk=128)
    assert found.sentence == "0.00 s: nothing was computed; no token came"
    assert found.bound is None and found.share_of_ceiling is None and found.prefill is None


def test_a_machine_that_was_not_measured_gives_the_times_and_says_so(
    program: ModelProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    explain = Explainer(CONFIG, program.specs, ("f16", "f16"), "portable", 1, 512)
    found = explain(metrics(51, **TIMES))
    assert found.bound is None and found.share_of_ceiling is None
    assert found.decode is not None and found.decode.seconds == 2.0
    assert found.sentence == (
        "3.50 s: 57% decode (50 tokens), 29% prefill (300 tokens), 14% waiting in the queue; this "
        "machine was not measured yet; run `pellucid machine` once to learn what bound it"
    )
    assert list(tmp_path.iterdir()) == []  # nothing was measured


def test_metrics_are_explained_once_and_copies_carry_the_explanation(ledger: Ledger) -> None:
    asked = []

    def explain(metrics: RequestMetrics) -> Explanation:
        asked.append(metrics)
        return explain_request(metrics, ledger, chunk=512)

    done = metrics(51, **TIMES)
    done.explainer = explain
    assert "explainer" not in repr(done) and done == metrics(51, **TIMES)
    json.dumps(asdict(done))
    assert asked == []  # it costs nothing until it is wanted
    assert done.bound == "memory" and done.share_of_ceiling is not None
    copy = pickle.loads(pickle.dumps(done))
    assert copy.explanation == done.explanation and len(asked) == 1
    assert metrics(51, **TIMES).bound is None
