"""Several tokens a step: whatever is drafted, each answer is that of the plain run, bit for bit.

The proposer of these tests knows the right answers. It drafts 0 to 8 tokens: right ones, wrong
ones, and right ones up to a point. Runs draw requests, engines and drafts from a seed.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pellucid import EngineConfig, RequestOutput, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.request import Request

from .drafting import drafting_core

VOCABULARY = 261
MAX_MODEL_LEN = 64
MOST_DRAFTS = 8
GROUPS, RUNS = 14, 30  # each group is a test


class Proposals:
    """Drafts from what the plain run gave, spoiled at random."""

    def __init__(self, rng: random.Random, answers: Mapping[str, Sequence[int]]) -> None:
        self._rng = rng
        self._answers = answers

    def __call__(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        return {r.request_id: self._drafts(r) for r in requests if self._rng.random() < 0.8}

    def _drafts(self, request: Request) -> list[int]:
        rng, given = self._rng, len(request.output_token_ids)
        right = list(self._answers[request.request_id][given : given + rng.randint(0, MOST_DRAFTS)])
        right += [rng.randrange(VOCABULARY) for _ in range(rng.choice((0, 0, 1, MOST_DRAFTS)))]
        if right and rng.random() < 0.5:
            right[rng.randrange(len(right))] = rng.randrange(VOCABULARY)
        return right[:MOST_DRAFTS]


def draw_params(rng: random.Random) -> SamplingParams:
    """Each option now and then, so that they meet."""

    def maybe(value: Any, default: Any, chance: float = 0.2) -> Any:
        return value if rng.random() < chance else default

    max_tokens = rng.randint(1, 24)
    detokenize = rng.random() < 0.9
    stop = [chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 30))]
    return SamplingParams(
        n=maybe(rng.randint(2, 3), 1),
        temperature=rng.choice((0.0, 0.7, 1.5)),
        top_k=maybe(rng.randint(1, 20), 0),
        top_p=maybe(0.8, 1.0),
        min_p=maybe(0.05, 0.0),
        typical_p=maybe(0.9, 1.0, 0.1),
        repetition_penalty=maybe(1.3, 1.0),
        presence_penalty=maybe(0.7, 0.0),
        frequency_penalty=maybe(0.4, 0.0),
        logit_bias=maybe({rng.randrange(256): 3.0}, None),
        # "A" may come, and then nothing may follow: an error in the middle of an answer
        allowed_token_ids=maybe([65, 66], None, 0.1),
        bad_words=maybe(["AA", "AB"], None),
        seed=rng.randrange(1 << 30),
        stop=maybe(stop, None) if detokenize else None,
        stop_token_ids=maybe([rng.randrange(256) for _ in range(20)], None),
        include_stop_str_in_output=rng.random() < 0.3,
        ignore_eos=rng.random() < 0.5,
        max_tokens=max_tokens,
        min_tokens=maybe(rng.randint(0, max_tokens), 0),
        logprobs=maybe(rng.randint(0, 3), None, 0.5),
        prompt_logprobs=maybe(1, None),
        detokenize=detokenize,
    )


def draw_submissions(rng: random.Random) -> list[Submission]:
    system = [rng.randrange(256) for _ in range(20)]
    prompts = [
        system[: rng.randint(0, 20)] + [rng.randrange(256) for _ in range(rng.randint(1, 15))]
        for _ in range(rng.randint(1, 6))
    ]
    return [
        Submission(
            f"r{i}",
            TokenizedPrompt(prompt, None, priority=rng.randint(0, 2)),
            params,
            # a token is a byte here
            banned_sequences=tuple(
                (*text.encode(),) for w in params.bad_words or () for text in (w, f" {w}")
            ),
        )
        for i, prompt in enumerate(prompts)
        for params in [draw_params(rng)]
    ]


def draw_config(rng: random.Random, model: OpenModel) -> EngineConfig:
    """Small chunks, few blocks, and memory for one request or for many."""
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=rng.choice((1, 3, 8, 16, 64)),
        max_num_seqs=rng.choice((1, 2, 4, 16)),
        block_size=rng.choice((16, 32)),
        enable_prefix_caching=rng.random() < 0.7,
        preemption=rng.choice(("recompute", "swap")),
        scheduling_policy=rng.choice(("fcfs", "priority", "fair", "lpm")),
        kv_cache_memory=1 << 20,
        swap_space=0.001,
        backend_options={"threads": 1},
    )
    layout = model.layout(config)
    blocks = layout.blocks_for(MAX_MODEL_LEN, config.max_num_batched_tokens)
    most = rng.choice((blocks, blocks + 2, 10 * blocks))
    return replace(config, kv_cache_memory=layout.bytes_per_block * most)


def run(
    core: EngineCore, submissions: Sequence[Submission], rng: random.Random
) -> dict[str, RequestOutput]:
    """The answers; requests arrive over several steps, and the books are checked after each."""
    done: dict[str, RequestOutput] = {}
    arriving = list(submissions)
    while arriving or core.has_unfinished:
        if arriving and (rng.random() < 0.5 or not core.has_unfinished):
            core.add_requests([arriving.pop(0)])
        for output in core.step():
            done[output.request_id] = output
        core.scheduler.check_integrity()
    kv = core.scheduler.kv
    assert kv.num_available_blocks == kv.num_blocks
    return done


def answers_of(outputs: Mapping[str, RequestOutput]) -> dict[str, list[int]]:
    """By the id of each request: those of a group are numbered."""
    return {
        name if len(output.outputs) == 1 else f"{name}-{completion.index}": completion.token_ids
        for name, output in outputs.items()
        for completion in output.outputs
    }


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[OpenModel]:
    with open_model(tiny_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def plain(model: OpenModel) -> EngineCore:
    """Without drafts, cache and lack of memory."""
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
        backend_options={"threads": 1},
        preemption="recompute",
        kv_cache_memory=1 << 18,
    )
    return model.build_engine(config).core


def raise_error(_: Sequence[Request]) -> Any:
    raise ZeroDivisionError("no draft")


@pytest.mark.parametrize(
    ("proposer", "sentence"),
    [
        (raise_error, r"it raised ZeroDivisionError\('no draft'\)"),
        (lambda _: None, "it gave None and no mapping"),
        (lambda _: [1, 2], r"it gave \[1, 2\] and no mapping"),
        (lambda rs: {r.request_id: None for r in rs}, "for 'a' it gave None and no draft"),
        (lambda rs: {r.request_id: "1" for r in rs}, "for 'a' it gave '1' and no draft"),
        (
            lambda rs: {r.request_id: [0, VOCABULARY] for r in rs},
            r"for 'a' it drafted \[0, 261\]; ",
        ),
        (lambda rs: {r.request_id: [-1] for r in rs}, r"for 'a' it drafted \[-1\]; "),
        (lambda rs: {r.request_id: [1.0] for r in rs}, r"for 'a' it drafted \[1\.0\]; "),
        (lambda rs: {r.request_id: [True] for r in rs}, r"for 'a' it drafted \[True\]; "),
        (
            lambda rs: {rs[-1].request_id: [1, "2"]} if rs else {},
            r"it drafted \[1, '2'\]; a token id is",
        ),
    ],
)
def test_a_proposer_that_is_wrong_costs_no_answer_and_is_told_once(
    model: OpenModel,
    plain: EngineCore,
    proposer: Callable[[Sequence[Request]], Any],
    sentence: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    asked = [Submission(name, TokenizedPrompt([*b"abc"], None), params) for name in "ab"]
    expected = run(plain, asked, random.Random(0))
    core = drafting_core(model, EngineConfig(max_model_len=MAX_MODEL_LEN), proposer)
    found = run(core, asked, random.Random(0))
    assert {name: o.outputs for name, o in found.items()} == {
        name: o.outputs for name, o in expected.items()
    }
    (told,) = caplog.messages
    assert re.fullmatch(f"guesses drafts no more tokens, because it is wrong: .*{sentence}.*", told)


def test_a_proposer_that_raises_when_a_request_ends_is_dropped(
    model: OpenModel, plain: EngineCore, caplog: pytest.LogCaptureFixture
) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    asked = [Submission(name, TokenizedPrompt([*b"abc"], None), params) for name in "ab"]
    core = drafting_core(model, EngineConfig(max_model_len=MAX_MODEL_LEN), lambda _: {})
    assert core.speculation is not None
    [proposer] = core.speculation.proposers
    proposer.finish = lambda request: 1 // 0  # type: ignore[method-assign,assignment]
    found, expected = (run(c, asked, random.Random(0)) for c in (core, plain))
    assert {name: o.outputs for name, o in found.items()} == {
        name: o.outputs for name, o in expected.items()
    }
    assert core.speculation.proposers == []
    (told,) = caplog.messages
    assert "because it is wrong: it raised ZeroDivisionError" in told


def test_any_number_of_drafts_may_be_proposed(model: OpenModel, plain: EngineCore) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    asked = [Submission("a", TokenizedPrompt([*b"abc"], None), params)]
    many = dict.fromkeys("ab", [7] * 1_000_000)  # nobody asked for b
    core = drafting_core(model, EngineConfig(max_model_len=MAX_MODEL_LEN), lambda _: many)
    found, expected = (run(c, asked, random.Random(0)) for c in (core, plain))
    assert found["a"].outputs == expected["a"].outputs


@pytest.mark.parametrize(
    "group", [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in range(2, GROUPS))]
)
def test_drafts_change_no_answer(model: OpenModel, plain: EngineCore, group: int) -> None:
    accepted = rejected = preempted = 0
    for seed in range(group * RUNS, (group + 1) * RUNS):
        rng = random.Random(seed)
        submissions = draw_submissions(rng)
        expected = run(plain, submissions, rng)
        core = drafting_core(model, draw_config(rng, model), Proposals(rng, answers_of(expected)))
        found = run(core, submissions, rng)
        for name, output in expected.items():
            assert found[name].outputs == output.outputs, f"seed {seed}"
            assert found[name].prompt_logprobs == output.prompt_logprobs, f"seed {seed}"
        stats = core.stats()
        accepted += stats.num_accepted_tokens
        rejected += stats.num_draft_tokens - stats.num_accepted_tokens
        preempted += stats.num_preemptions
    assert accepted > 100 and rejected > 100 and preempted > 0  # or nothing was shown
