"""Who is next: the order that each policy promises, and when each way of batching admits."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.engine_config import Batching, SchedulingPolicy
from pellucid.errors import RequestError
from pellucid.kv.manager import KVCacheManager
from pellucid.request import Request
from pellucid.sampling_params import SamplingParams
from pellucid.scheduler import Scheduler
from pellucid.scheduler.waiting import (
    _LONGEST_LPM_QUEUE,
    _OUTPUT_WEIGHT,
    _PATIENCE,
    _PROMPT_WEIGHT,
    WaitingQueue,
)

from .canary import build_layout

BLOCK = 4
ROOM = 512  # blocks, where memory is not what a test is about


def scheduler(
    policy: SchedulingPolicy = "fcfs",
    batching: Batching = "continuous",
    *,
    blocks: int = ROOM,
    seqs: int = 1,
    budget: int = 512,
) -> Scheduler:
    kv = KVCacheManager(build_layout([None], block_size=BLOCK), blocks)
    longest = kv.capacity(budget, BLOCK * blocks)
    return Scheduler(
        kv,
        max_model_len=longest,
        max_num_batched_tokens=budget,
        max_num_seqs=seqs,
        policy=policy,
        batching=batching,
    )


def request(
    name: str,
    prompt: int | list[int] = 4,
    outputs: int = 1,
    *,
    salt: str | None = None,
    priority: int = 0,
    tenant: str = "",
) -> Request:
    """Of a prefix that nobody shares, unless `salt` says so."""
    return Request(
        request_id=name,
        prompt_token_ids=prompt if isinstance(prompt, list) else [1] * prompt,
        params=SamplingParams(max_tokens=outputs),
        seed=0,
        eos_token_ids=frozenset(),
        max_tokens=outputs,
        cache_salt=name if salt is None else salt,
        priority=priority,
        tenant=tenant,
    )


def step(s: Scheduler) -> list[str]:
    """One step: who is in it."""
    plan = s.schedule()
    s.update(plan, {r.request_id: [1] for r in plan.requests if r.is_sampling})
    s.check_integrity()
    return [r.request_id for r in plan.requests]


def finish(s: Scheduler) -> None:
    while s.num_unfinished:
        step(s)


def events(s: Scheduler, kind: str) -> list[str]:
    return [name for event in s.events if event.kind == kind for name in event.request_ids]


def admitted(s: Scheduler) -> list[str]:
    """In order."""
    return events(s, "admit")


# ---- fcfs and priority


@pytest.mark.parametrize(
    ("policy", "order"),
    [("fcfs", "abcd"), ("priority", "cbda")],  # of equal priority, who came first
)
def test_the_order_of_admission(policy: SchedulingPolicy, order: str) -> None:
    s = scheduler(policy)
    s.add(*(request(name, priority=p) for name, p in zip("abcd", (7, 0, -3, 0), strict=True)))
    finish(s)
    assert admitted(s) == list(order)


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", "young"), ("priority", "old")])
def test_who_is_last_in_rank_gives_its_memory_to_the_others(
    policy: SchedulingPolicy, victim: str
) -> None:
    s = scheduler(policy, blocks=6, seqs=2)
    s.add(request("old", 8, 12, priority=5))
    step(s)
    s.add(request("young", 8, 12, priority=0))
    finish(s)
    assert set(events(s, "preempt")) == {victim} == set(events(s, "resume"))
    other = {"old": "young", "young": "old"}[victim]
    assert events(s, "finish") == [other, victim]


def test_a_preempted_request_comes_before_those_that_arrived_after_it() -> None:
    s = scheduler(blocks=6, seqs=2)
    s.add(request("a", 8, 12), request("b", 8, 12), request("c", 8, 2))
    finish(s)
    assert events(s, "preempt") and events(s, "finish") == list("abc")


def test_the_first_in_rank_advances_in_every_step() -> None:
    s = scheduler(blocks=8, seqs=4, budget=8)
    first = request("first", 12, 16)
    s.add(first, *(request(f"r{i}", 10, 14) for i in range(6)))
    while not first.is_finished:
        before = first.num_computed_tokens
        step(s)
        assert first.num_computed_tokens > before
    assert s.num_preemptions > 0
    finish(s)


def test_a_higher_priority_takes_a_sequence_from_the_last_in_rank_at_once() -> None:
    s = scheduler("priority", seqs=2)
    s.add(request("high", 8, 12, priority=1), request("low", 8, 12, priority=5))
    for _ in range(3):
        step(s)
    s.add(request("urgent", 8, 4, priority=0))
    assert step(s) == ["urgent", "high"]
    assert events(s, "preempt") == ["low"]
    finish(s)
    assert events(s, "finish") == ["urgent", "high", "low"]
    assert events(s, "preempt") == ["low"]  # it came back once, and nobody took turns


def test_a_higher_priority_takes_blocks_from_the_last_in_rank_at_once() -> None:
    s = scheduler("priority", blocks=8, seqs=4)
    s.add(request("a", 8, 8, priority=3), request("b", 8, 8, priority=4))
    step(s)
    s.add(request("urgent", 20, 4, priority=0))
    assert step(s) == ["urgent", "a"]
    assert events(s, "preempt") == ["b"]
    finish(s)
    assert events(s, "finish")[0] == "urgent"


def test_a_higher_priority_takes_the_budget_of_a_long_prompt() -> None:
    s = scheduler("priority", seqs=4, budget=8)
    s.add(request("long", 100, 1, priority=9))
    step(s)
    s.add(request("urgent", 8, 2, priority=0))
    assert step(s) == ["urgent"]
    assert step(s) == ["urgent", "long"]
    assert s.num_preemptions == 0
    finish(s)


def test_equal_priorities_never_preempt_each_other() -> None:
    s = scheduler("priority", seqs=1)
    s.add(request("first", 4, 6, priority=2))
    step(s)
    s.add(request("second", 4, 2, priority=2), request("lower", 4, 2, priority=3))
    finish(s)
    assert events(s, "finish") == ["first", "second", "lower"]
    assert s.num_preemptions == 0


def test_under_other_policies_a_priority_takes_nothing() -> None:
    s = scheduler("fcfs", seqs=1)
    s.add(request("first", 4, 6, priority=9))
    step(s)
    s.add(request("second", 4, 2, priority=0))
    finish(s)
    assert events(s, "finish") == ["first", "second"]


@pytest.mark.parametrize("seqs", [1, 3])
def test_each_preemption_makes_room_for_a_higher_priority(seqs: int) -> None:
    """A burst of random priorities: nobody is preempted by an equal or a lower one, and all end."""
    rng = random.Random(seqs)
    s = scheduler("priority", seqs=seqs)
    everybody: dict[str, Request] = {}
    for i in range(60):
        new = request(str(i), rng.randint(1, 12), rng.randint(1, 9), priority=rng.randint(0, 4))
        everybody[new.request_id] = new
        s.add(new)
        waiting = min(r.priority for r in s.waiting.requests())
        before = len(events(s, "preempt"))
        step(s)
        for victim in events(s, "preempt")[before:]:
            assert everybody[victim].priority > waiting
        lowest = max((r.priority for r in s.running), default=0)
        assert all(r.priority >= lowest for r in s.waiting.requests())
    finish(s)
    assert all(r.is_finished for r in everybody.values())


# ---- lpm

PREFIX = list(range(2, 2 + 2 * _PATIENCE))  # worth two steps of waiting


def warmed(s: Scheduler) -> Scheduler:
    """With PREFIX in the cache."""
    s.add(request("warm", PREFIX, salt="shared"))
    finish(s)
    return s


def sharing(name: str, tokens: int = len(PREFIX)) -> Request:
    return request(name, [*PREFIX[:tokens], 1], salt="shared")


def test_lpm_serves_the_longest_cached_prefix_first() -> None:
    s = warmed(scheduler("lpm"))
    s.add(request("none", 8), sharing("half", 16), sharing("whole"), sharing("whole, later"))
    finish(s)
    assert admitted(s) == ["warm", "whole", "whole, later", "half", "none"]


@pytest.mark.parametrize("steps", [1, 2])
def test_lpm_lets_a_request_wait_only_as_many_steps_as_the_others_prefix_is_worth(
    steps: int,
) -> None:
    s = warmed(scheduler("lpm"))
    s.add(request("none", 8))
    for i in range(steps + 3):  # in every step another comes, whose prefix is cached
        s.add(sharing(f"hit {i}", steps * _PATIENCE))
        step(s)
    assert admitted(s)[1 : steps + 3] == [
        *(f"hit {i}" for i in range(steps)),
        "none",
        f"hit {steps}",
    ]


@pytest.mark.parametrize("length", [_LONGEST_LPM_QUEUE, _LONGEST_LPM_QUEUE + 1])
def test_lpm_serves_a_queue_that_is_too_long_to_search_in_order_of_arrival(length: int) -> None:
    s = warmed(scheduler("lpm"))
    s.add(*(request(f"r{i}") for i in range(length - 1)), sharing("hit"))
    step(s)
    assert admitted(s)[1] == ("hit" if length == _LONGEST_LPM_QUEUE else "r0")
    finish(s)


# ---- fair


def test_fair_takes_turns_however_many_one_tenant_has_sent() -> None:
    s = scheduler("fair")
    s.add(*(request(f"a{i}", tenant="a") for i in range(4)))
    s.add(*(request(f"b{i}", tenant="b") for i in range(2)))
    finish(s)
    assert admitted(s) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_fair_counts_an_output_token_twice() -> None:
    s = scheduler("fair")
    s.add(request("a0", 4, outputs=4, tenant="a"), request("a1", tenant="a"))
    s.add(*(request(f"b{i}", 4, outputs=1, tenant="b") for i in range(4)))
    finish(s)
    # 4 + 8 for a0; 6 for each of b: at 12 each, a1 came first
    assert admitted(s) == ["a0", "b0", "b1", "a1", "b2", "b3"]


def test_fair_gives_no_credit_for_idle_time() -> None:
    s = scheduler("fair")
    s.add(request("b0", tenant="b"), *(request(f"a{i}", tenant="a") for i in range(8)))
    for _ in range(6):
        step(s)
    s.add(*(request(f"b{i}", tenant="b") for i in range(1, 5)))
    finish(s)
    assert admitted(s) == [
        "b0",
        "a0",
        "a1",
        "a2",
        "a3",
        "a4",
        "a5",
        "b1",
        "a6",
        "b2",
        "a7",
        "b3",
        "b4",
    ]


# of prompts and answers
LENGTHS = st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=12, max_size=12)


@settings(max_examples=30, deadline=None)
@given(LENGTHS, LENGTHS, st.integers(1, 3))
def test_fair_serves_two_tenants_alike_while_both_have_requests_waiting(
    a: Sequence[tuple[int, int]], b: Sequence[tuple[int, int]], seqs: int
) -> None:
    """The bound of Sheng et al. (arXiv:2401.00588, §4.1) in our terms: a tenant is admitted only
    while its counter is the least, so it passes another by no more than what its requests that run
    still cost: `seqs` of the largest."""
    s = scheduler("fair", seqs=seqs)
    requests = {
        f"{tenant}{i}": request(f"{tenant}{i}", p, o, tenant=tenant)
        for tenant, load in (("a", a), ("b", b))
        for i, (p, o) in enumerate(load)
    }
    s.add(*requests.values())
    bound = seqs * max(_PROMPT_WEIGHT * p + _OUTPUT_WEIGHT * o for p, o in (*a, *b))

    def served(tenant: str) -> int:
        own = [r for r in requests.values() if r.tenant == tenant and r.num_computed_tokens]
        return sum(
            _PROMPT_WEIGHT * r.num_prompt_tokens + _OUTPUT_WEIGHT * len(r.output_token_ids)
            for r in own
        )

    while {r.tenant for r in s.waiting.requests()} == {"a", "b"}:
        step(s)
        assert abs(served("a") - served("b")) <= bound
    finish(s)


# ---- ways of batching


def test_static_batching_admits_nobody_before_the_last_of_the_batch_has_ended() -> None:
    s = scheduler(batching="static", seqs=2)
    s.add(request("short", outputs=1), request("long", outputs=3), request("next"))
    assert [step(s) for _ in range(4)] == [["short", "long"], ["long"], ["long"], ["next"]]


def test_dynamic_batching_puts_lengths_together_that_are_alike() -> None:
    s = scheduler(batching="dynamic", seqs=2)
    s.add(*(request(f"{n}", n) for n in (4, 20, 19, 5)))
    assert [step(s), step(s)] == [["4", "5"], ["20", "19"]]


def test_continuous_batching_admits_in_the_step_after_a_place_becomes_free() -> None:
    s = scheduler(seqs=2)
    s.add(request("short", outputs=1), request("long", outputs=3), request("next", outputs=2))
    assert [step(s) for _ in range(3)] == [["short", "long"], ["long", "next"], ["long", "next"]]
    assert not s.num_unfinished


# behind those that decode in rank, and before them
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_a_prompt_takes_what_those_that_decode_leave_of_the_budget(
    policy: SchedulingPolicy,
) -> None:
    s = scheduler(policy, seqs=3, budget=8)
    s.add(request("a", 4, 9), request("b", 4, 9))
    step(s)
    s.add(request("prompt", 14, 1, priority=-1))
    counts = []
    for _ in range(3):
        plan = s.schedule()
        counts.append({r.request_id: r.num_scheduled_tokens for r in plan.requests})
        s.update(plan, {r.request_id: [1] for r in plan.requests if r.is_sampling})
    assert counts == [
        {"a": 1, "b": 1, "prompt": 6},
        {"a": 1, "b": 1, "prompt": 6},
        {"a": 1, "b": 1, "prompt": 2},
    ]


def test_samples_of_one_prompt_wait_for_the_first_and_compute_what_is_left_of_a_block() -> None:
    s = scheduler(seqs=4, budget=16)
    s.add(*(request(f"sample {i}", list(range(30)), 2, salt="") for i in range(4)))
    counts = []
    while s.num_unfinished:
        plan = s.schedule()
        counts.append([r.num_scheduled_tokens for r in plan.requests])
        s.update(plan, {r.request_id: [1] for r in plan.requests if r.is_sampling})
    assert counts[:2] == [[16], [14]]  # alone; the others wait for the blocks that it publishes
    assert sum(map(sum, counts)) < 2 * 30
    assert s.num_cached_tokens >= 3 * 28


@pytest.mark.parametrize(
    ("limit", "says"),
    [
        ({"max_waiting_requests": 2}, "3 requests were submitted together; max_waiting_requests"),
        ({"max_waiting_tokens": 5}, "6 prompt tokens were submitted together; max_waiting_tokens"),
    ],
)
def test_what_never_fits_in_the_queue_is_not_told_to_try_again(
    limit: dict[str, int], says: str
) -> None:
    most = (limit.get("max_waiting_requests"), limit.get("max_waiting_tokens"))
    queue = WaitingQueue("fcfs", lambda _: 0, *most)
    with pytest.raises(RequestError, match=says):
        queue.check_room(3, 6)
    queue.check_room(2, 5)
