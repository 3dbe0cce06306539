"""The counts of draft KV follow the blocks wherever the cache moves them.

A second canary stands for the draft: it writes a digest of each token that it computes into a twin
of the block, and whatever the cache says is covered must hold the digest of the request's tokens.
"""

import random

import pytest

from pellucid.batch import BlockOp
from pellucid.kv.draft_coverage import DraftCoverage
from pellucid.kv.manager import KVCacheManager
from pellucid.request import Request
from pellucid.scheduler import ScheduledStep, Scheduler

from .canary import (
    ALPHABET,
    CanaryRunner,
    attach_drafts,
    build_layout,
    build_request,
    expected_tokens,
)

SIZE = 4


class DraftCanary:
    """The draft's half of each block: what was computed there, by anybody."""

    def __init__(self, num_blocks: int, num_slots: int) -> None:
        self.coverage = DraftCoverage(num_blocks, SIZE)
        self._blocks: list[list[int]] = [[0] * SIZE for _ in range(num_blocks)]
        self._slots: list[list[int]] = [[0] * SIZE for _ in range(num_slots)]
        self.num_found = 0  # tokens that need not be computed again

    def run(self, ops: list[BlockOp]) -> None:
        for op in ops:
            source = self._slots if op.kind == "load" else self._blocks
            target = self._slots if op.kind == "save" else self._blocks
            target[op.target] = list(source[op.source])

    def check(self, request: Request) -> int:
        """How many tokens are covered; each of them must have been computed for these tokens."""
        table = request.block_tables[0]
        count = self.coverage.count(table, request.num_tokens)
        for position in range(count):
            found = self._blocks[table[position // SIZE]][position % SIZE]
            assert found == _digest(request, position), (request.request_id, position)
        return count

    def compute(self, request: Request, most: int, guesses: int) -> None:
        """Compute some known tokens, and then write guesses behind the last of all."""
        table, start = request.block_tables[0], self.check(request)
        self.num_found += start
        stop = min(request.num_tokens, start + most, len(table) * SIZE)
        for position in range(start, stop):
            self._blocks[table[position // SIZE]][position % SIZE] = _digest(request, position)
        self.coverage.extend(table, stop)
        for position in range(stop, min(stop + guesses, len(table) * SIZE)):
            self._blocks[table[position // SIZE]][position % SIZE] = -1


def _digest(request: Request, position: int) -> int:
    return hash((request.cache_salt, tuple(request.token_ids(0, position + 1))))


@pytest.mark.parametrize("seed", range(60))
def test_what_is_covered_was_computed_for_the_requests_own_tokens(seed: int) -> None:
    rng = random.Random(seed)
    num_blocks, num_slots = rng.randint(8, 24), rng.choice((0, 3, 40))
    draft = DraftCanary(num_blocks, num_slots)
    kv = KVCacheManager(
        build_layout([None], SIZE),
        num_blocks,
        enable_prefix_caching=rng.random() < 0.8,
        num_slots=num_slots,
        coverage=draft.coverage,
    )
    budget = rng.randint(1, 12)
    scheduler = Scheduler(
        kv,
        max_model_len=kv.capacity(budget, 40),
        max_num_batched_tokens=budget,
        max_num_seqs=rng.randint(1, 4),
        policy=rng.choice(("fcfs", "priority")),
    )
    runner = CanaryRunner(kv, num_slots)
    requests: list[Request] = []
    for i in range(rng.randint(2, 8)):
        shared = rng.choice(requests).token_ids(0, rng.randint(0, 20)) if requests else []
        prompt = shared + [rng.randrange(ALPHABET) for _ in range(rng.randint(1, 12))]
        prompt = prompt[: scheduler.max_model_len - 1]
        most = min(rng.randint(1, 12), scheduler.max_model_len - len(prompt))
        requests.append(
            build_request(
                str(i), prompt, most, priority=rng.randint(0, 2), cache_salt=rng.choice("aab")
            )
        )
    arriving = list(requests)
    for _ in range(2000):
        if arriving and rng.random() < 0.3:
            scheduler.add(arriving.pop(0))
        if not scheduler.num_unfinished:
            if not arriving:
                break
            continue
        # The draft computes for some requests, and guesses behind them.
        for request in scheduler.running:
            if request.is_decoding and rng.random() < 0.5:
                kv.allocate_slots(request, 1 + rng.randint(0, 4))
                draft.run(ops := kv.take_ops())
                _copy(runner, ops)
                draft.compute(request, rng.choice((1, 3, 100)), rng.randint(0, 4))
        attach_drafts(scheduler, rng.choices([ALPHABET, ALPHABET, 0], k=rng.randint(0, 5)))
        step = scheduler.schedule()
        draft.run(step.block_ops)
        scheduler.update(step, runner.execute(step))
        scheduler.check_integrity()
        for request in scheduler.running:
            draft.check(request)
    assert not scheduler.num_unfinished and not arriving
    for request in requests:
        assert request.output_token_ids == expected_tokens(request)


def _copy(runner: CanaryRunner, ops: list[BlockOp]) -> None:
    """The block operations of the model's own half."""
    runner.execute(ScheduledStep([], ops))


def test_a_partly_matching_block_is_covered_as_far_as_it_matches() -> None:
    coverage = DraftCoverage(2, SIZE)
    coverage.extend([0], 3)
    coverage.copy(0, 1)
    coverage.limit([1], 2)
    assert (coverage.count([0], 9), coverage.count([1], 9), coverage.count([0, 1], 9)) == (3, 2, 3)


def test_the_count_ends_at_the_first_gap() -> None:
    coverage = DraftCoverage(3, SIZE)
    coverage.extend([0, 1, 2], 12)
    coverage.clear([1])
    assert coverage.count([0, 1, 2], 12) == 4
    coverage.extend([0, 1, 2], 6)
    assert coverage.count([0, 1, 2], 12) == 6
    coverage.save(1, 5)
    coverage.load(5, 0)
    assert coverage.count([0, 2], 12) == 2


@pytest.mark.parametrize("is_swapped", [False, True])
def test_what_the_draft_computed_for_one_request_is_there_for_the_next(is_swapped: bool) -> None:
    draft = DraftCanary(6, 6)
    kv = KVCacheManager(build_layout([None], SIZE), 6, num_slots=6, coverage=draft.coverage)
    scheduler = Scheduler(kv, max_model_len=24, max_num_batched_tokens=24, max_num_seqs=1)
    runner = CanaryRunner(kv, 6)

    def run(name: str, prompt: list[int]) -> int:
        """The tokens that were covered when it began to decode; all its known tokens are then."""
        request = build_request(name, prompt, 2)
        scheduler.add(request)
        covered = -1
        for _ in range(10):
            if request.is_decoding and covered < 0:
                covered = draft.check(request)
                draft.compute(request, 100, 0)
            if request.is_finished:
                break
            step = scheduler.schedule()
            draft.run(step.block_ops)
            scheduler.update(step, runner.execute(step))
        return covered

    prompt = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert run("first", prompt) == 0
    if is_swapped:
        run("another", [2] * 22)
        assert kv.num_saved_blocks > 0
    # whole blocks are shared, or loaded, and of the last one the part that matches is copied
    assert run("second", [*prompt[:9], 2, 2]) == 9
    assert kv.num_loaded_blocks == (3 if is_swapped else 0)


def test_a_block_that_was_lent_to_another_is_not_the_same_block() -> None:
    """What the draft wrote into it may be gone, though the request has the block again."""
    coverage = DraftCoverage(2, SIZE)
    before = coverage.owners([0, 1])
    coverage.clear([1])
    assert [a == b for a, b in zip(before, coverage.owners([0, 1]), strict=True)] == [True, False]
