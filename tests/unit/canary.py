"""A runner for the scheduler's tests that computes nothing and checks everything: every KV slot
holds what it must, or somebody erred.

One idea: a slot's content is a digest of all that the keys and values of its position depend on
(salt, layer group, tokens up to it), so it is as telling as real numbers and costs nothing. A step
writes the digests of the tokens that it computes, and then, as attention does, reads every slot
that they see: through the block tables, the window included. The next token is drawn from what was
read. Blocks are copied, saved and loaded as the step says.

`expected_tokens` is the oracle: the same rule without a cache.
"""

from collections.abc import Sequence
from typing import Any

from pellucid.kv.layout import KVLayout, LayerGroup
from pellucid.kv.manager import KVCacheManager
from pellucid.kv_spec import KVSpec
from pellucid.pooling_params import Pooling, PoolingParams
from pellucid.request import Request
from pellucid.sampling_params import SamplingParams
from pellucid.scheduler import ScheduledStep, Scheduler

ALPHABET = 3  # tokens: few, so that prefixes meet


def build_layout(windows: Sequence[int | None], block_size: int) -> KVLayout:
    """One layer per group."""
    groups = tuple(LayerGroup((i,), window) for i, window in enumerate(windows))
    specs = tuple(KVSpec(1, 2, 2, "f32", "f32", window) for window in windows)
    return KVLayout(groups, specs, token_bytes=(16,) * len(windows), block_size=block_size)


def build_request(name: str, prompt: Sequence[int], max_tokens: int = 4, **fields: Any) -> Request:
    """A greedy request of that many output tokens."""
    params = SamplingParams(max_tokens=max_tokens or 1, temperature=0, ignore_eos=True)
    return Request(
        request_id=name,
        prompt_token_ids=list(prompt),
        params=params,
        seed=0,
        max_tokens=max_tokens,
        **fields,
    )


def build_pooled_request(name: str, prompt: Sequence[int], pooling: Any, **fields: Any) -> Request:
    """A request for an embedding."""
    state = Pooling(PoolingParams(pooling=pooling), len(prompt))
    return build_request(name, prompt, 0, pooling=state, **fields)


def expected_embedding(request: Request) -> list[int]:
    """The positions that its embedding must be made of, each once and in order."""
    assert request.pooling is not None
    last = request.num_prompt_tokens - 1
    return [last] if request.pooling.params.pooling == "last" else list(range(last + 1))


def expected_tokens(request: Request) -> list[int]:
    """What the request must give, whatever else runs."""
    tokens = list(request.prompt_token_ids)
    for _ in range(request.max_tokens):
        tokens.append(_draw(tokens))
    return tokens[len(request.prompt_token_ids) :]


def _draw(tokens: Sequence[int]) -> int:
    return hash(tuple(tokens)) % ALPHABET


def attach_drafts(scheduler: Scheduler, drafts: Sequence[int]) -> None:
    """Give each request that decodes these drafts; an entry of ALPHABET becomes what is right."""
    for request in scheduler.running:
        if request.is_decoding:
            tokens = request.token_ids(0, request.num_tokens)
            for draft in drafts:
                tokens.append(_draw(tokens) if draft == ALPHABET else draft)
            request.draft_token_ids = tokens[request.num_tokens :]


class CanaryRunner:
    """Stands where `ModelRunner` does."""

    def __init__(self, kv: KVCacheManager, num_slots: int = 0) -> None:
        self._layout = kv.layout
        self._blocks: list[list[int | None]] = [
            [None] * kv.layout.block_size for _ in range(kv.num_blocks)
        ]
        self._slots: list[list[int | None]] = [
            [None] * kv.layout.block_size for _ in range(num_slots)
        ]

    def execute(self, step: ScheduledStep) -> dict[str, list[int]]:
        """Do the block ops, write and read; the drawn tokens: the drafts that stand, and one
        more.
        """
        for op in step.block_ops:
            source = self._slots if op.kind == "load" else self._blocks
            target = self._slots if op.kind == "save" else self._blocks
            target[op.target] = list(source[op.source])
        for request in step.requests:
            if request.num_scheduled_tokens < 1:
                raise AssertionError(
                    f"{request.request_id} computes nothing, so there are no logits to draw from"
                )
            self._write(request)
        sampled: dict[str, list[int]] = {}
        for request in step.requests:
            self._read(request)
            self._pool(request)
            if not request.is_sampling:
                continue
            tokens = request.token_ids(0, request.num_tokens)
            standing = sampled[request.request_id] = []
            for draft in [*request.draft_token_ids[: request.num_scheduled_drafts], None]:
                standing.append(_draw(tokens))
                if standing[-1] != draft:
                    break
                tokens.append(draft)
        return sampled

    def _pool(self, request: Request) -> None:
        """Collect the positions whose hidden states are pooled, in place of a sum."""
        if request.pooling is not None:
            positions = request.pooling.needed(*self._span(request))
            if positions:
                request.pooling.total = [*(request.pooling.total or ()), *positions]
                request.pooling.next = positions.stop

    def _span(self, request: Request) -> tuple[int, int]:
        start = request.num_computed_tokens
        return start, start + request.num_scheduled_tokens

    def _write(self, request: Request) -> None:
        start, stop = self._span(request)
        for g, table in enumerate(request.block_tables):
            for position in range(start, stop):
                block, offset = self._place(table, position)
                self._blocks[block][offset] = self._digest(request, g, position)

    def _read(self, request: Request) -> None:
        start, stop = self._span(request)
        for g, (table, group) in enumerate(
            zip(request.block_tables, self._layout.groups, strict=True)
        ):
            first = 0 if group.window is None else max(0, start - group.window + 1)
            for position in range(first, stop):
                block, offset = self._place(table, position)
                if self._blocks[block][offset] != self._digest(request, g, position):
                    raise AssertionError(
                        f"{request.request_id} reads stale KV at position {position} of group "
                        f"{g}, block {block}"
                    )

    def _place(self, table: list[int], position: int) -> tuple[int, int]:
        block = table[position // self._layout.block_size]
        if block < 0:
            raise AssertionError(f"position {position} is read, and its block was given back")
        return block, position % self._layout.block_size

    @staticmethod
    def _digest(request: Request, group: int, position: int) -> int:
        known = request.token_ids(0, position + 1)
        drafts = request.draft_token_ids[: max(0, position + 1 - request.num_tokens)]
        return hash((request.cache_salt, group, *known, *drafts))


def run_to_the_end(scheduler: Scheduler, runner: CanaryRunner, most_steps: int = 10_000) -> None:
    """Step until nothing is left, checking every invariant after each step."""
    for _ in range(most_steps):
        if not scheduler.num_unfinished:
            return
        step = scheduler.schedule()
        scheduler.update(step, runner.execute(step))
        scheduler.check_integrity()
    raise AssertionError(f"{scheduler.num_unfinished} requests are left after {most_steps} steps")
