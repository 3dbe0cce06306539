"""The scheduler alone: integers in, integers out."""

import pytest

from pellucid.errors import RequestError
from pellucid.kv.manager import KVCacheManager
from pellucid.request import Request, RequestStatus
from pellucid.sampling_params import SamplingParams
from pellucid.scheduler import Scheduler

from .canary import build_layout, build_pooled_request

EOS = 7


def _scheduler(num_blocks: int = 8, budget: int = 8, num_seqs: int = 1) -> Scheduler:
    kv = KVCacheManager(build_layout([None], block_size=4), num_blocks)
    return Scheduler(
        kv,
        max_model_len=kv.capacity(budget, 4 * num_blocks),
        max_num_batched_tokens=budget,
        max_num_seqs=num_seqs,
    )


def _request(
    name: str, length: int, max_tokens: int = 4, cache_salt: str = "", **params: object
) -> Request:
    return Request(
        cache_salt=cache_salt,
        request_id=name,
        prompt_token_ids=[1] * length,
        params=SamplingParams(max_tokens=max_tokens, **params),  # type: ignore[arg-type]
        seed=0,
        eos_token_ids=frozenset({EOS}),
        max_tokens=max_tokens,
    )


def _run(scheduler: Scheduler, token_id: int = 1) -> list[tuple[str, int]]:
    """Step until nothing is left, drawing the same token each time: (request, tokens computed) of
    each step.
    """
    trace = []
    while scheduler.num_unfinished:
        step = scheduler.schedule()
        trace += [(r.request_id, r.num_scheduled_tokens) for r in step.requests]
        scheduler.update(step, {r.request_id: [token_id] for r in step.requests if r.is_sampling})
        scheduler.check_integrity()
    return trace


def test_a_long_prompt_is_computed_in_chunks_and_then_token_by_token() -> None:
    scheduler = _scheduler(budget=8)
    scheduler.add(_request("a", 19, max_tokens=3))
    assert _run(scheduler) == [("a", 8), ("a", 8), ("a", 3), ("a", 1), ("a", 1)]


def test_with_one_sequence_requests_run_one_after_another_in_order_of_arrival() -> None:
    scheduler = _scheduler()
    for name in "ab":
        scheduler.add(_request(name, 2, max_tokens=2, cache_salt=name))
    assert _run(scheduler) == [("a", 2), ("a", 1), ("b", 2), ("b", 1)]
    assert scheduler.kv.num_available_blocks == 8


def test_the_last_output_token_is_never_computed() -> None:
    scheduler = _scheduler()
    request = _request("a", 2, max_tokens=3)
    scheduler.add(request)
    _run(scheduler)
    assert request.num_tokens == 5
    assert request.num_computed_tokens == 4
    assert request.finish_reason == "length"


@pytest.mark.parametrize(
    ("params", "outputs", "finish_reason", "stop_reason"),
    [
        ({}, 1, "stop", None),
        ({"ignore_eos": True}, 4, "length", None),
        ({"min_tokens": 3}, 3, "stop", None),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, 1, "stop", EOS),
    ],
)
def test_what_ends_a_request(
    params: dict[str, object], outputs: int, finish_reason: str, stop_reason: int | None
) -> None:
    scheduler = _scheduler()
    request = _request("a", 2, max_tokens=4, **params)  # type: ignore[arg-type]
    scheduler.add(request)
    _run(scheduler, token_id=EOS)
    assert (len(request.output_token_ids), request.finish_reason, request.stop_reason) == (
        outputs,
        finish_reason,
        stop_reason,
    )


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers() -> None:
    scheduler = _scheduler(num_blocks=2)
    with pytest.raises(RequestError, match=r"8 tokens.*at most 7"):
        scheduler.add(_request("a", 8))
    with pytest.raises(RequestError, match="empty"):
        scheduler.add(_request("b", 0))
    assert scheduler.num_unfinished == 0


def test_a_request_is_ended_while_it_waits_while_it_runs_and_in_the_middle_of_a_step() -> None:
    scheduler = _scheduler()
    waiting, running, inside = (_request(name, 6) for name in ("waiting", "running", "inside"))
    for request in (running, inside, waiting):
        scheduler.add(request)
    scheduler.finish(waiting, "abort")
    step = scheduler.schedule()
    scheduler.update(step, {"running": [1]})
    scheduler.finish(running, "abort")
    step = scheduler.schedule()
    scheduler.finish(inside, "abort")
    scheduler.update(step, {"inside": [1]})
    assert inside.output_token_ids == []
    assert {r.status for r in (waiting, running, inside)} == {RequestStatus.FINISHED}
    assert scheduler.num_unfinished == 0
    assert scheduler.kv.num_available_blocks == 8
    scheduler.finish(inside, "stop")
    assert inside.finish_reason == "abort"


def test_after_a_crash_a_request_that_goes_on_publishes_its_prefix_anew() -> None:
    scheduler = _scheduler(num_blocks=32, budget=8, num_seqs=2)
    survivor, crashed = (
        _request("survivor", 8, max_tokens=8),
        _request("crashed", 20, cache_salt="b"),
    )
    for request in (survivor, crashed):
        scheduler.add(request)
        step = scheduler.schedule()
        scheduler.update(
            step,
            {
                r.request_id: [len(survivor.output_token_ids) + 10]
                for r in step.requests
                if r.is_sampling
            },
        )
    scheduler.finish(crashed, "error")
    scheduler.kv.forget()
    while not survivor.is_finished:
        step = scheduler.schedule()
        scheduler.update(step, {"survivor": [len(survivor.output_token_ids) + 10]})
        scheduler.check_integrity()
    again = _request("again", 8)
    again.output_token_ids = list(survivor.output_token_ids)
    assert scheduler.kv.lookup(again).num_tokens == 15
    behind = _request("behind", 1)
    behind.prompt_token_ids = survivor.output_token_ids[:7]
    assert scheduler.kv.lookup(behind).num_tokens == 0


# ---- several tokens a step


def _decoding(scheduler: Scheduler, *requests: Request) -> None:
    """Run requests until each has its first token, 1."""
    scheduler.add(*requests)
    while not all(r.is_decoding for r in requests):
        step = scheduler.schedule()
        scheduler.update(step, {r.request_id: [1] for r in step.requests if r.is_sampling})


@pytest.mark.parametrize(("sampled", "computed"), [([5], 4), ([1, 5], 5), ([1, 1, 1, 5], 7)])
def test_the_counter_stays_behind_the_drafts_that_do_not_stand(
    sampled: list[int], computed: int
) -> None:
    scheduler = _scheduler()
    request = _request("a", 3, max_tokens=20)
    _decoding(scheduler, request)
    request.draft_token_ids = [1, 1, 1]
    step = scheduler.schedule()
    assert (request.num_scheduled_tokens, request.num_scheduled_drafts) == (4, 3)
    assert request.is_sampling and request.num_tokens == 4
    scheduler.update(step, {"a": sampled})
    scheduler.check_integrity()
    assert request.output_token_ids == [1, *sampled]
    assert (request.num_computed_tokens, request.draft_token_ids) == (computed, [])
    # what is published is what was drawn: the drafts that did not stand are not found
    scheduler.finish(request, "abort")
    other = _request("b", 3)
    other.prompt_token_ids = [1] * 8
    assert scheduler.kv.lookup(other).num_tokens == (7 if sampled[:3] == [1, 1, 1] else computed)


def test_a_stop_token_among_the_drafts_ends_the_request_there() -> None:
    scheduler = _scheduler()
    request = _request("a", 3, max_tokens=20)
    _decoding(scheduler, request)
    request.draft_token_ids = [2, EOS, 3]
    scheduler.update(scheduler.schedule(), {"a": [2, EOS, 3, 4]})
    assert (request.output_token_ids, request.finish_reason) == ([1, 2, EOS], "stop")
    assert request.num_computed_tokens == request.num_tokens - 1


def test_no_more_drafts_are_computed_than_the_answer_and_the_budget_have_room_for() -> None:
    scheduler = _scheduler(num_blocks=16, budget=6, num_seqs=3)
    short, long, last = (
        _request(n, 3, max_tokens=m) for n, m in zip("abc", (5, 9, 9), strict=True)
    )
    _decoding(scheduler, short, long, last)
    for request in (short, long, last):
        request.draft_token_ids = [1] * 8
    step = scheduler.schedule()
    # a has two tokens of five, so two drafts and one more; one token is set aside for each other
    assert [r.num_scheduled_tokens for r in step.requests] == [3, 2, 1]


def test_nobody_is_preempted_for_a_draft() -> None:
    scheduler = _scheduler(num_blocks=4, budget=8, num_seqs=2)
    first, second = (_request(n, 6, max_tokens=8, cache_salt=n) for n in "ab")
    _decoding(scheduler, first, second)
    first.draft_token_ids = [1, 1, 1]
    step = scheduler.schedule()
    assert [r.num_scheduled_tokens for r in step.requests] == [1, 1]
    assert scheduler.num_preemptions == 0


@pytest.mark.parametrize("when", ["this step", "an earlier step"])
def test_nobody_is_preempted_for_a_draft_of_another(when: str) -> None:
    """The first request's drafts take the last block, and the second needs one for its token."""
    scheduler = _scheduler(num_blocks=5, budget=16, num_seqs=2)
    first = _request("a", 6, max_tokens=8, cache_salt="a")
    second = _request("b", 8 if when == "this step" else 7, max_tokens=8, cache_salt="b")
    _decoding(scheduler, first, second)
    first.draft_token_ids = [1, 1, 1]
    step = scheduler.schedule()
    if when == "an earlier step":
        assert scheduler.kv.num_available_blocks == 0
        scheduler.update(step, {"a": [2], "b": [1]})  # no draft was right
        step = scheduler.schedule()
    assert [r.num_scheduled_tokens for r in step.requests] == [1, 1]
    assert scheduler.num_preemptions == 0
    scheduler.update(step, {"a": [1], "b": [1]})
    scheduler.check_integrity()


@pytest.mark.parametrize("is_running", [False, True])
def test_no_prompt_waits_for_a_draft(is_running: bool) -> None:
    scheduler = _scheduler(num_blocks=16, budget=6, num_seqs=2)
    first, second = _request("a", 3, max_tokens=20), _request("b", 20, cache_salt="b")
    _decoding(scheduler, first)
    scheduler.add(second)
    if is_running:
        scheduler.update(scheduler.schedule(), {"a": [1]})
    first.draft_token_ids = [1] * 8
    step = scheduler.schedule()
    assert [(r.request_id, r.num_scheduled_tokens) for r in step.requests] == [("a", 1), ("b", 5)]


def test_no_prompt_waits_for_the_blocks_of_a_draft_model() -> None:
    """It took them before the step was planned."""
    scheduler = _scheduler(num_blocks=4, num_seqs=2)
    first, second = _request("a", 3, max_tokens=12), _request("b", 8, cache_salt="b")
    _decoding(scheduler, first)
    assert scheduler.kv.allocate_slots(first, 12)
    scheduler.add(second)
    step = scheduler.schedule()
    assert [(r.request_id, r.num_scheduled_tokens) for r in step.requests] == [("a", 1), ("b", 7)]


def test_a_rejected_draft_keeps_no_block() -> None:
    scheduler = _scheduler()
    request = _request("a", 3, max_tokens=20)
    _decoding(scheduler, request)
    request.draft_token_ids = [1] * 7
    step = scheduler.schedule()
    assert (request.num_scheduled_drafts, len(request.block_tables[0])) == (7, 3)
    scheduler.update(step, {"a": [1, 1, 5]})
    assert (request.num_computed_tokens, len(request.block_tables[0])) == (6, 2)
    scheduler.check_integrity()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_an_embedding_ends_with_its_prompt_which_may_fill_the_context(pooling: str) -> None:
    scheduler = _scheduler(num_blocks=5, budget=8)
    with pytest.raises(RequestError, match="21 tokens; it must be at most 20 "):
        scheduler.add(build_pooled_request("b", [1] * 21, pooling))
    request = build_pooled_request("a", [1] * 20, pooling)
    scheduler.add(request)
    assert _run(scheduler) == [("a", 8), ("a", 8), ("a", 4)]
    assert request.finish_reason == "stop" and request.output_token_ids == []


def test_a_request_that_must_compute_a_prefix_does_not_wait_for_it() -> None:
    """Another request computes the same tokens; a mean needs their hidden states all the same, and
    prompt_logprobs their logits.
    """
    scheduler = _scheduler(num_blocks=20, budget=40, num_seqs=5)
    scheduler.add(_request("first", 16))
    scheduler.add(build_pooled_request("last", [1] * 9, "last"))
    scheduler.add(build_pooled_request("mean", [1] * 9, "mean"))
    scheduler.add(_request("scored", 9, prompt_logprobs=0))
    planned = [r.request_id for r in scheduler.schedule().requests]
    assert planned == ["first", "mean", "scored"]
