"""Plans of the native backend: no symbol is written over while somebody still reads it, and threads
meet wherever they must.

Both are found out by `race_checker.py`, which knows nothing of how plans are made; and it is tested
itself, by taking barriers away.
"""

import dataclasses
import functools

import numpy as np
import pytest

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.capture import Capture, Entry, Rows, Symbol, capture
from pellucid.backends.native.plan import Plan, build_plan
from pellucid.batch import ForwardBatch
from pellucid.formats import encode_dense
from pellucid.kv_spec import build_kv_specs
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import KVLayer, Ops, Tensor
from tests.models.harness import GOLDEN, GOLDEN_NAMES, load

from .race_checker import find_overwritten, find_races
from .random_forward import batch_of, random_forward

SEEDS = range(12)


def embed(output: Symbol) -> Entry:
    return Entry("embed", [], output, attributes={"learned": 0, "scale": 1.0})


STEPS = [
    {"tokens": 16, "logits": 16, "threads": 2},
    {"tokens": 16, "logits": 6, "threads": 3},
    {"tokens": 5, "logits": 2, "threads": 4},
]


def planned(seed: int) -> tuple[list[Entry], Plan]:
    captured = capture(random_forward(seed))
    return captured.entries, build_plan(captured)


def races(entries: list[Entry], plan: Plan, barriers: list[bool]) -> list[tuple[int, int]]:
    return [race for step in STEPS for race in find_races(entries, plan, barriers, **step)]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_symbol_is_written_over_while_it_is_read(seed: int) -> None:
    entries, plan = planned(seed)
    assert find_overwritten(entries, plan) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_meet_between_entries_that_touch_the_same_bytes(seed: int) -> None:
    entries, plan = planned(seed)
    assert races(entries, plan, plan.barriers) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_every_barrier_is_needed_and_its_lack_is_found(seed: int) -> None:
    entries, plan = planned(seed)
    assert sum(plan.barriers) > 3
    for i in np.flatnonzero(plan.barriers):
        # the first result is read by nobody, and its place taken: not a model's doing
        if entries[i].op == entries[i - 1].op == "linear":
            continue
        without = [barrier and k != i for k, barrier in enumerate(plan.barriers)]
        assert races(entries, plan, without), f"entry {i} of {len(entries)}: {entries[i].op}"


def test_a_plan_takes_far_less_memory_than_its_symbols() -> None:
    _, plan = planned(0)
    assert plan.bytes_per_token < sum(p.size for p in plan.buffers) / 2


def test_memory_that_is_handed_out_twice_is_found() -> None:
    """A mutation: every symbol at the beginning of the arena."""
    entries, plan = planned(0)
    crowded = dataclasses.replace(
        plan, buffers=[dataclasses.replace(p, offset=0) for p in plan.buffers]
    )
    assert find_overwritten(entries, crowded)


def test_quantized_rows_in_the_place_of_plain_ones_are_waited_for() -> None:
    """128 quantized numbers take the place of 48 floats: thread by thread they are not the same
    bytes.
    """
    x, result = Symbol(128), Symbol(128)
    # until the place is handed out again
    meanwhile = [Entry("add", [x, x], Symbol(16)) for _ in range(3)]
    before, after = Symbol(48), Symbol(128, quantized=True)
    entries = [embed(before), embed(x), Entry("add", [before, before], Symbol(48))]
    entries += [*meanwhile, Entry("quantize", [x], after), Entry("linear", [after], result)]
    plan = build_plan(Capture(entries, result))
    places = [plan.buffers[plan.index[symbol]] for symbol in (before, after)]
    assert places[0].offset == places[1].offset and places[0].size == places[1].size
    assert races(entries, plan, plan.barriers) == []
    taken = next(i for i, entry in enumerate(entries) if entry.output is after)
    assert plan.barriers[taken] and races(
        entries, plan, [b and i != taken for i, b in enumerate(plan.barriers)]
    )


def test_reading_needs_no_barrier_and_rows_of_ones_own_neither() -> None:
    entries, plan = planned(1)
    for i, entry in enumerate(entries[:-1]):
        following = entries[i + 1]
        if entry.op == "linear" and following.op == "linear" and following.inputs == entry.inputs:
            assert not plan.barriers[i + 1]
    x, y, z = Symbol(64), Symbol(64), Symbol(64)
    chain = [embed(x), Entry("silu_mul", [x, x], y), Entry("add", [x, y], z)]
    assert build_plan(Capture(chain, z)).barriers == [False] * 3


def test_a_softcap_writes_over_its_input_only_where_nobody_reads_that_later() -> None:
    def capped(ops: Ops, batch: ForwardBatch, again: bool) -> Tensor:
        x = ops.embedding(table, batch.input_ids)
        y = ops.softcap(x, 2.0)
        return ops.add(x, y) if again else ops.add(y, y)

    native = NativeBackend(threads=2)
    rows = np.random.default_rng(0).normal(size=(20, 32)).astype(np.float32) * 3
    table = native.load_weight(encode_dense(rows))
    batch = batch_of(16)
    x = rows[batch.input_ids]
    for again, expected in ((True, x + 2 * np.tanh(x / 2)), (False, 4 * np.tanh(x / 2))):
        found = native.build_forward(functools.partial(capped, again=again))(batch).to_host()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    entries = capture(functools.partial(capped, again=False)).entries
    assert entries[1].output is not None and entries[1].output.storage is entries[0].output


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program_gives_the_same_bits_on_one_thread_and_on_four(seed: int) -> None:
    runs = [
        NativeBackend(threads=threads).build_forward(random_forward(seed)) for threads in (1, 4)
    ]
    for tokens in (1, 5, 16, 37, 16):  # larger, and then smaller than before
        one, four = (run(batch_of(tokens)).to_host() for run in runs)
        assert np.array_equal(one, four, equal_nan=True)
        assert np.isfinite(one).all()


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_hidden_states_cost_a_model_no_barrier_and_no_memory(name: str) -> None:
    """So a step without embeddings takes as long as if there were none."""
    loaded = load(GOLDEN / name, "native")
    graph, config, specs = get_graph(loaded.config.graph), loaded.config, loaded.weights
    caches = [KVLayer(spec) for spec in build_kv_specs(config, "f16", "f16")]
    plain = capture(lambda ops, batch: graph.forward(ops, config, specs, batch, caches))
    both = capture(lambda ops, batch: graph.forward_with_hidden(ops, config, specs, batch, caches))
    added = [entry for entry in both.entries if entry.output and entry.output.rows is Rows.HIDDEN]
    assert len(both.entries) - len(plain.entries) == len(added) == 2  # take rows, norm
    plans = build_plan(plain), build_plan(both)
    assert sum(plans[0].barriers) == sum(plans[1].barriers)
    assert plans[0].bytes_per_token == plans[1].bytes_per_token
