"""The scheduler's laws of drafts, checked at every step of random runs.

- A step with drafts plans what it would plan without them: the same requests, tokens and
  preemptions. Drafts get the tokens of the budget and the blocks that are left, and a draft model
  gives back its blocks where others need them.
- Every draft that is computed has its slots.
- Behind a step nothing is kept of a rejected draft: no block, no step of the window, and no prefix
  that a later request could hit.
"""

import copy
import random
from collections.abc import Iterator
from types import CellType, FunctionType
from typing import Any

import pytest

from pellucid.kv.manager import KVCacheManager
from pellucid.kv.node import HOLE, Node
from pellucid.request import Request
from pellucid.scheduler import ScheduledStep, Scheduler

from .canary import ALPHABET, CanaryRunner, attach_drafts, build_layout, build_request

GROUPS, RUNS = 3, 20  # each group is a test
MOST_STEPS = 400


def draw_scheduler(rng: random.Random) -> Scheduler:
    """Few blocks, a small budget, and each kind of KV cache."""
    windows = rng.choice([(None,), (None, 3), (5,), (None, 2, 7)])
    num_slots = rng.choice([0, 0, 20])
    kv = KVCacheManager(
        build_layout(windows, rng.choice([1, 2, 4])),
        rng.randint(8, 24),
        enable_prefix_caching=rng.random() < 0.7,
        num_slots=num_slots,
    )
    budget = rng.randint(1, 12)
    return Scheduler(
        kv,
        max_model_len=kv.capacity(budget, 48),
        max_num_batched_tokens=budget,
        max_num_seqs=rng.randint(1, 5),
        policy=rng.choice(["fcfs", "priority", "lpm", "fair"]),
        batching=rng.choice(["continuous", "continuous", "static", "dynamic"]),
    )


def draw_request(rng: random.Random, name: str, scheduler: Scheduler) -> Request:
    """A prompt that may begin like another's."""
    system = [i % ALPHABET for i in range(rng.randint(0, 8))]
    prompt = (system + [rng.randrange(ALPHABET) for _ in range(rng.randint(1, 9))])[
        : scheduler.max_model_len - 1
    ]
    max_tokens = min(rng.randint(4, 20), scheduler.max_model_len - len(prompt))
    return build_request(name, prompt, max_tokens, priority=rng.randint(0, 2))


def draw_drafts(rng: random.Random) -> list[int]:
    """Right tokens (ALPHABET), with a wrong one now and then."""
    return [rng.choice([ALPHABET, ALPHABET, rng.randrange(ALPHABET)]) for _ in range(8)]


def copy_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    """A deep copy that sees copies of what the function sees: orders of eviction are functions."""
    cells = tuple(
        CellType(copy.deepcopy(c.cell_contents, memo)) for c in function.__closure__ or ()
    )
    return FunctionType(function.__code__, function.__globals__, closure=cells)


def without_drafts(scheduler: Scheduler) -> tuple[list[tuple[str, int]], list[str]]:
    """The plan of the next step if nobody had drafts, and who runs then."""
    twin = copy.deepcopy(scheduler)
    for request in twin.running:
        request.draft_token_ids = []
    return plan_of(twin.schedule()), [r.request_id for r in twin.running]


def plan_of(step: ScheduledStep) -> list[tuple[str, int]]:
    """Who computes how many tokens, without drafts."""
    return [(r.request_id, r.num_scheduled_tokens - r.num_scheduled_drafts) for r in step.requests]


def published(kv: KVCacheManager) -> Iterator[tuple[str, list[int]]]:
    """The salt and the tokens of each path of the prefix tree."""
    for salt, root in kv._tree._roots.items():
        for node in root.descendants():
            tokens: list[int] = []
            above: Node | None = node
            while above is not None:
                tokens, above = above.tokens + tokens, above.parent
            yield salt, tokens


def reserve(rng: random.Random, scheduler: Scheduler) -> None:
    """A draft model takes slots before the step is planned. With a prefix cache it may evict what a
    waiting request would hit, so the plan is another.
    """
    if scheduler.kv.enable_prefix_caching:
        return
    for request in scheduler.running:
        if request.is_decoding and rng.random() < 0.5:
            scheduler.kv.allocate_slots(request, rng.randint(1, 8))


def check_nothing_is_left_of_drafts(scheduler: Scheduler, requests: list[Request]) -> None:
    """After a step: blocks, windows and published prefixes are those of verified tokens."""
    kv = scheduler.kv
    for request in scheduler.running:
        computed = request.num_computed_tokens
        assert computed <= request.num_tokens
        for table, group in zip(request.block_tables, kv.layout.groups, strict=True):
            assert len(table) == kv.layout.columns_for(computed) or not kv.enable_prefix_caching
            assert HOLE not in table[group.first_needed(computed, kv.layout.block_size) :]
    known = [r.token_ids(0, r.num_tokens) for r in requests]
    for _, tokens in published(kv):
        assert any(tokens == those[: len(tokens)] for those in known)


@pytest.mark.parametrize(
    "group", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, GROUPS))]
)
def test_drafts_take_what_is_left_and_leave_nothing(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(copy._deepcopy_dispatch, FunctionType, copy_function)  # type: ignore[attr-defined]
    num_drafts = num_rejected = num_preemptions = num_crowded = 0
    for seed in range(group * RUNS, (group + 1) * RUNS):
        rng = random.Random(seed)
        scheduler = draw_scheduler(rng)
        runner = CanaryRunner(scheduler.kv, scheduler.kv._tier.num_slots)
        requests = [draw_request(rng, str(i), scheduler) for i in range(rng.randint(4, 8))]
        arriving = list(requests)
        for _ in range(MOST_STEPS):
            if arriving and (rng.random() < 0.5 or not scheduler.num_unfinished):
                scheduler.add(arriving.pop())
            if not scheduler.num_unfinished:
                break
            # Plan with drafts, and without.
            attach_drafts(scheduler, draw_drafts(rng))
            plain, running = without_drafts(scheduler)
            reserve(rng, scheduler)
            step = scheduler.schedule()
            assert plan_of(step) == plain
            assert [r.request_id for r in scheduler.running] == running
            # The budget holds, and the drafts have their slots.
            computed = sum(r.num_scheduled_tokens for r in step.requests)
            assert computed <= scheduler.max_num_batched_tokens
            for request in step.requests:
                stop = request.num_computed_tokens + request.num_scheduled_tokens
                columns = scheduler.kv.layout.columns_for(stop)
                assert all(len(table) >= columns for table in request.block_tables)
                assert len(request.output_token_ids) + request.num_scheduled_drafts < (
                    request.max_tokens
                )
            # Compute it.
            drafted = {r.request_id: r.num_scheduled_drafts for r in step.requests}
            wanted = sum(len(r.draft_token_ids) for r in step.requests)
            sampled = runner.execute(step)
            scheduler.update(step, sampled)
            scheduler.check_integrity()
            check_nothing_is_left_of_drafts(scheduler, requests)
            num_drafts += sum(drafted.values())
            num_rejected += sum(n - len(sampled[r]) + 1 for r, n in drafted.items() if n)
            num_crowded += wanted > sum(drafted.values())
        assert all(r.finish_reason == "length" for r in requests)
        num_preemptions += scheduler.num_preemptions
    # or nothing was shown
    assert num_drafts > num_rejected > 100 and num_crowded > 100 and num_preemptions > 0
