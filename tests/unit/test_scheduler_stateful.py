"""The scheduler and the KV cache under any sequence of requests, steps, aborts and crashes: every
slot that is read holds what it must, every request gives what it would give alone, and nothing
leaks."""

import os
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pellucid.kv.manager import KVCacheManager
from pellucid.request import Request
from pellucid.scheduler import Scheduler

from .canary import (
    ALPHABET,
    CanaryRunner,
    attach_drafts,
    build_layout,
    build_pooled_request,
    build_request,
    expected_embedding,
    expected_tokens,
    run_to_the_end,
)

pytestmark = pytest.mark.slow  # thousands of steps

TOKENS = st.integers(0, ALPHABET - 1)
# proposed tokens; ALPHABET stands for the right one
DRAFTS = st.lists(st.sampled_from([ALPHABET, ALPHABET, ALPHABET, 0]), max_size=8)
WINDOWS = st.sampled_from([(None,), (None, 3), (5,), (None, 2, 7), (4, None)])


class EngineMachine(RuleBasedStateMachine):
    """A scheduler over the canary runner."""

    @initialize(
        windows=WINDOWS,
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(8, 40),
        num_slots=st.sampled_from([0, 3, 40, 40]),
        saving_pays=st.sampled_from([True, True, True, False]),
        budget=st.integers(1, 12),
        max_num_seqs=st.integers(1, 5),
        caching=st.booleans(),
        policy=st.sampled_from(["fcfs", "priority", "lpm", "fair"]),
        batching=st.sampled_from(["continuous", "continuous", "static", "dynamic"]),
    )
    def begin(
        self,
        windows: tuple[int | None, ...],
        block_size: int,
        num_blocks: int,
        num_slots: int,
        saving_pays: bool,
        budget: int,
        max_num_seqs: int,
        caching: bool,
        policy: Any,
        batching: Any,
    ) -> None:
        self.num_blocks = num_blocks
        self.kv = KVCacheManager(
            build_layout(windows, block_size),
            num_blocks,
            enable_prefix_caching=caching,
            num_slots=num_slots,
            saving_pays=lambda: saving_pays,
        )
        self.max_model_len = self.kv.capacity(budget, 48)
        self.scheduler = Scheduler(
            self.kv,
            max_model_len=self.max_model_len,
            max_num_batched_tokens=budget,
            max_num_seqs=max_num_seqs,
            policy=policy,
            batching=batching,
        )
        self.runner = CanaryRunner(self.kv, num_slots)
        self.requests: list[Request] = []

    @rule(
        prompt=st.lists(TOKENS, min_size=1, max_size=24),
        like=st.integers(0, 100),
        share=st.integers(0, 30),
        max_tokens=st.integers(1, 12),
        salt=st.sampled_from(["", "", "a"]),
        priority=st.integers(0, 2),
        tenant=st.sampled_from(["x", "y"]),
        pooling=st.sampled_from([None, None, None, "last", "mean"]),
    )
    def add(
        self,
        prompt: list[int],
        like: int,
        share: int,
        max_tokens: int,
        salt: str,
        priority: int,
        tenant: str,
        pooling: str | None,
    ) -> None:
        """A new request, which may begin like an old one, or ask for an embedding."""
        if self.requests:
            other = self.requests[like % len(self.requests)]
            prompt = other.token_ids(0, min(share, other.num_tokens)) + prompt
        prompt = prompt[: self.max_model_len - (pooling is None)]
        if not prompt:
            return
        name, max_tokens = (
            str(len(self.requests)),
            min(max_tokens, self.max_model_len - len(prompt)),
        )
        standing: Any = {"cache_salt": salt, "priority": priority, "tenant": tenant}
        if pooling is None:
            request = build_request(name, prompt, max_tokens, **standing)
        else:
            request = build_pooled_request(name, prompt, pooling, **standing)
        self.requests.append(request)
        self.scheduler.add(request)

    @precondition(lambda self: self.scheduler.num_unfinished)
    @rule(count=st.integers(1, 5), drafts=DRAFTS)
    def step(self, count: int, drafts: list[int]) -> None:
        for _ in range(count):
            attach_drafts(self.scheduler, drafts)
            step = self.scheduler.schedule()
            assert (
                sum(r.num_scheduled_tokens for r in step.requests)
                <= self.scheduler.max_num_batched_tokens
            )
            self.scheduler.update(step, self.runner.execute(step))
            self.scheduler.check_integrity()

    @precondition(lambda self: self.scheduler.num_unfinished)
    @rule(fails=st.integers(0, 4))
    def lose_blocks(self, fails: int) -> None:
        """A step whose blocks cannot be loaded computes nothing, and is planned again."""
        step = self.scheduler.schedule()
        if fails == 4 and any(op.kind == "load" for op in step.block_ops):
            self.scheduler.retry(step)
        else:
            self.scheduler.update(step, self.runner.execute(step))
        self.scheduler.check_integrity()

    @precondition(lambda self: self.requests)
    @rule(which=st.integers(0, 100))
    def abort(self, which: int) -> None:
        self.scheduler.finish(self.requests[which % len(self.requests)], "abort")

    @precondition(lambda self: self.requests and self.scheduler.num_unfinished)
    @rule(which=st.integers(0, 100), drafts=DRAFTS)
    def abort_in_a_step(self, which: int, drafts: list[int]) -> None:
        attach_drafts(self.scheduler, drafts)
        step = self.scheduler.schedule()
        sampled = self.runner.execute(step)
        self.scheduler.finish(self.requests[which % len(self.requests)], "abort")
        self.scheduler.update(step, sampled)

    @precondition(lambda self: self.scheduler.num_unfinished)
    @rule()
    def crash(self) -> None:
        """A step that never ran."""
        for request in self.scheduler.schedule().requests:
            self.scheduler.finish(request, "error")
        self.kv.forget()

    @invariant()
    def the_books_add_up(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            for request in self.requests:
                assert (
                    request.output_token_ids
                    == expected_tokens(request)[: len(request.output_token_ids)]
                )
                if request.pooling is not None and request.finish_reason == "stop":
                    assert request.pooling.total == expected_embedding(request)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        run_to_the_end(self.scheduler, self.runner)
        for request in self.requests:
            assert request.is_finished
            if request.pooling is not None:
                assert request.finish_reason in ("stop", "abort", "error")
            if request.finish_reason == "length":
                assert request.output_token_ids == expected_tokens(request)
        assert self.kv.num_available_blocks == self.num_blocks


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=150,
    stateful_step_count=30,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    # scripts/mutate asks only whether, not how little
    phases=[Phase.generate] if "PELLUCID_NO_SHRINKING" in os.environ else list(Phase),
)
