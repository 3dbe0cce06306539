"""The law of the tokens on the path that production takes: a chi-square test with drafts.

A few thousand requests with seeds of their own draw three tokens each, in batches, every draft
verified. At each position the tokens must have the model's own distribution, which is computed here
from its logits, in float64, apart from the engine's sampler. A second statistic counts how often
a token is the drafted one, which must be as often as the model says. It shows a bias towards drafts
that is too small for chi-square. A test that passes says little unless it would fail:
`test_a_bias_is_found` plants biases with as many samples. Seeds are fixed, so the tests are
deterministic.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid import EngineConfig, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.model_runner import ModelRunner
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.request import Request

from .drafting import drafting_core

PROMPT = [*b"the quick brown fox"]
NUM_SAMPLES = 2400
LENGTH = 3
LEAST_EXPECTED = 8  # samples in a cell; rarer tokens share one
MOST_STEPS = 20_000
LIKELY = range(6)  # ranks of the tokens behind which drafts are made

LAWS: dict[str, dict[str, Any]] = {
    "top-k": {"temperature": 1.0, "top_k": 6},
    "top-p": {"temperature": 0.8, "top_p": 0.6},
    "min-p": {"temperature": 1.5, "min_p": 0.2},
    "allowed": {"temperature": 1.2, "allowed_token_ids": [97, 98, 99, 100, 101]},
}
Law = dict[int, float]  # token -> probability


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[OpenModel]:
    with open_model(tiny_path) as opened:
        yield opened


def law_of(logprobs: NDArray[np.float64], shape: dict[str, Any]) -> Law:
    """The distribution of a token by the definitions of the parameters."""
    logits = logprobs / shape["temperature"]
    if "allowed_token_ids" in shape:
        mask = np.full(len(logits), -np.inf)
        mask[shape["allowed_token_ids"]] = 0
        logits = logits + mask
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    keep = len(order)
    if "top_k" in shape:
        keep = shape["top_k"]
    if "top_p" in shape:
        keep = int(np.searchsorted(np.cumsum(probs[order]), shape["top_p"])) + 1
    kept = [int(t) for t in order[:keep] if probs[t] >= shape.get("min_p", 0.0) * probs.max()]
    total = sum(probs[t] for t in kept)
    return {t: float(probs[t] / total) for t in kept if probs[t] > 0}


class Oracle:
    """The model's own distributions, from greedy runs of one token without drafts."""

    def __init__(self, model: OpenModel) -> None:
        self._core = model.build_engine(config()).core
        self._known: dict[tuple[int, ...], NDArray[np.float64]] = {}

    def logprobs(self, contexts: Sequence[tuple[int, ...]]) -> None:
        """Compute the logprobs of all tokens behind each context, in one batch."""
        ask = [c for c in dict.fromkeys(contexts) if c not in self._known]
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)
        submissions = [
            Submission(str(i), TokenizedPrompt([*PROMPT, *c], None), params)
            for i, c in enumerate(ask)
        ]
        for name, output in run(self._core, submissions).items():
            [row] = output.outputs[0].logprobs or []
            array = np.full(1 + max(row), -np.inf)
            for token_id, entry in row.items():
                array[token_id] = entry.logprob
            self._known[ask[int(name)]] = array

    def law(self, context: tuple[int, ...], shape: dict[str, Any]) -> Law:
        return law_of(self._known[context], shape)


def config() -> EngineConfig:
    return EngineConfig(
        max_model_len=32,
        max_num_seqs=32,
        enable_prefix_caching=True,
        backend_options={"threads": 1},
        speculative=None,
    )


def run(core: EngineCore, submissions: Sequence[Submission]) -> dict[str, Any]:
    core.add_requests(submissions)
    done: dict[str, Any] = {}
    for _ in range(MOST_STEPS):
        if not core.has_unfinished:
            return done
        done.update((o.request_id, o) for o in core.step() if o.finished)
    raise AssertionError("the requests do not end")


def likely(law: Law) -> list[int]:
    """The tokens, the likeliest first."""
    return sorted(law, key=lambda t: -law[t])


def to_tokens(
    ranked: dict[tuple[int, ...], list[int]], ranks: Sequence[int]
) -> tuple[int, ...] | None:
    """The tokens of these ranks, one behind the other; None if a distribution has fewer."""
    tokens: tuple[int, ...] = ()
    for rank in ranks:
        if rank >= len(ranked[tokens]):
            return None
        tokens = (*tokens, ranked[tokens][rank])
    return tokens


@dataclass
class Drawn:
    core: EngineCore
    samples: list[tuple[int, ...]]  # the tokens of each request
    # each draft's first token: the request, the tokens before it, the token
    drafted: list[tuple[int, tuple[int, ...], int]]


def draw(model: OpenModel, oracle: Oracle, shape: dict[str, Any]) -> Drawn:
    """The tokens of all samples, with drafts of likely and unlikely tokens."""
    # What is likely behind likely beginnings.
    ranked: dict[tuple[int, ...], list[int]] = {}
    for length in range(LENGTH):
        beginnings = itertools.product(*[LIKELY] * length)
        contexts = [c for b in beginnings if (c := to_tokens(ranked, b)) is not None]
        oracle.logprobs(contexts)
        ranked |= {c: likely(oracle.law(c, shape)) for c in contexts}

    drafted: list[tuple[int, tuple[int, ...], int]] = []

    def guess(requests: Sequence[Request]) -> dict[str, list[int]]:
        # Each request has its own choice among likely tokens, the second and third too.
        drafts: dict[str, list[int]] = {}
        for r in requests:
            context, draft = tuple(r.output_token_ids), []
            for i in range(1 + r.seed % LENGTH):
                if context not in ranked:
                    break
                draft.append(ranked[context][(r.seed // 7 + i) % min(3, len(ranked[context]))])
                context = (*context, draft[-1])
            drafts[r.request_id] = draft
            if draft:
                drafted.append((int(r.request_id), tuple(r.output_token_ids), draft[0]))
        return drafts

    core = drafting_core(model, config(), guess)
    submissions = [
        Submission(
            str(i),
            TokenizedPrompt(PROMPT, None),
            SamplingParams(seed=i, max_tokens=LENGTH + 1, ignore_eos=True, **shape),
        )
        for i in range(NUM_SAMPLES)
    ]
    found = run(core, submissions)
    samples = [tuple(found[str(i)].outputs[0].token_ids) for i in range(NUM_SAMPLES)]
    return Drawn(core, samples, drafted)


def excess(oracle: Oracle, drawn: Drawn, shape: dict[str, Any]) -> float:
    """How much more often than the model says a token was the drafted one, in standard
    deviations.
    """
    difference = variance = 0.0
    for request, context, token in drawn.drafted:
        p = oracle.law(context, shape).get(token, 0.0)
        difference += (drawn.samples[request][len(context)] == token) - p
        variance += p * (1 - p)
    return difference / math.sqrt(variance)


def p_value(counts: Counter[int], law: Law) -> float:
    """Pearson's chi-square of the counts against the law; tokens that are rare share a cell. 0 if
    a token came that the law excludes.
    """
    if any(token not in law for token in counts):
        return 0.0
    total = sum(counts.values())
    cells = [(counts[t], total * p) for t, p in law.items() if total * p >= LEAST_EXPECTED]
    rest = total - sum(c for c, _ in cells), total - sum(e for _, e in cells)
    if rest[1] > 1e-6 * total:
        cells.append(rest)
    if len(cells) < 2:
        return 1.0
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    return chi_square_tail(statistic, len(cells) - 1)


def chi_square_tail(statistic: float, degrees: int) -> float:
    """P(X > statistic), by Wilson and Hilferty's approximation, which is good to a percent here."""
    z = (statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2 / (9 * degrees)) / math.sqrt(2))


def p_values(oracle: Oracle, samples: Sequence[Any], shape: dict[str, Any]) -> list[float]:
    """Of the tokens at each position, behind each beginning that is frequent enough to test."""
    found = []
    beginnings = [Counter(s[:n] for s in samples if len(s) > n) for n in range(LENGTH)]
    frequent = [c for count in beginnings for c, n in count.items() if n >= 300]
    oracle.logprobs(frequent)
    for context in frequent:
        n = len(context)
        counts = Counter(s[n] for s in samples if s[:n] == context and len(s) > n)
        found.append(p_value(counts, oracle.law(context, shape)))
    return found


@pytest.mark.parametrize("name", LAWS)
def test_tokens_have_the_models_distribution(model: OpenModel, name: str) -> None:
    oracle = Oracle(model)
    drawn = draw(model, oracle, LAWS[name])
    found = p_values(oracle, drawn.samples, LAWS[name])
    assert len(found) >= 3 and min(found) > 0.01 / len(found), found
    assert abs(excess(oracle, drawn, LAWS[name])) < 3
    stats = drawn.core.stats()
    num_rejected = stats.num_draft_tokens - stats.num_accepted_tokens
    assert stats.num_accepted_tokens > 300 and num_rejected > 300


@pytest.mark.parametrize("one_of", [2, 8])
def test_a_bias_is_found(model: OpenModel, one_of: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong draft is accepted in one of two or eight cases, so drafts are given too often. To
    replace a rejected draft by a token of the target's own distribution, the mistake that is made
    most often in rejection sampling, has the same effect.
    """
    wrong = itertools.count()
    exact: Callable[..., None] = ModelRunner._sample

    def biased(rows: Any, logits: Any, result: Any) -> None:
        exact(rows, logits, result)
        for r in rows:
            tokens, drafts = result.sampled.get(r.request.request_id, []), r.request.draft_token_ids
            if len(r.sampled) > 1 and tokens[0] != drafts[0] and next(wrong) % one_of == 0:
                tokens[0] = drafts[0]

    monkeypatch.setattr(ModelRunner, "_sample", staticmethod(biased))
    oracle = Oracle(model)
    drawn = draw(model, oracle, LAWS["top-k"])
    if one_of == 2:
        assert min(p_values(oracle, drawn.samples, LAWS["top-k"])) < 1e-6
    assert excess(oracle, drawn, LAWS["top-k"]) > 5
    assert next(wrong) > 300


def test_the_chi_square_tail_is_the_known_one() -> None:
    for statistic, degrees, tail in ((3.841, 1, 0.05), (18.307, 10, 0.05), (23.209, 10, 0.01)):
        assert chi_square_tail(statistic, degrees) == pytest.approx(tail, rel=0.06)
