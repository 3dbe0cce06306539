"""What a parameter declares beside its shape, put to use: `shard` cuts each golden model in two for
tensor parallelism, and `group` collects the inputs that a calibration for quantization needs.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.batch import ForwardBatch
from pellucid.config import ModelConfig
from pellucid.kv_spec import build_kv_specs
from pellucid.models.params import Param
from pellucid.models.registry import get_graph
from pellucid.ops.kv_dtypes import choose_kv_dtypes
from pellucid.ops.protocol import KVLayer

from .harness import BLOCK_SIZES, GOLDEN, GOLDEN_NAMES, Chunk, Loaded, Session, check_close, load

Array = NDArray[np.float32]
NUM_RANKS = 2
NUM_BLOCKS = 64
STEPS = ((0, 13), (13, 14), (14, 40))  # a prompt, one token, another chunk


def declared(config: ModelConfig) -> dict[str, Param]:
    return {param.name: param for param in get_graph(config.graph).parameters(config)}


def run_steps(session: Session, input_ids: NDArray[np.int32]) -> Array:
    """The logits of all tokens, computed in chunks through the cache."""
    blocks = session.take_blocks(len(input_ids))
    return np.concatenate(
        [session.run([Chunk(input_ids[a:b], a, blocks)]) for a, b in STEPS if a < len(input_ids)]
    )


def with_ops(ops: Any, **changed: Callable[..., Any]) -> Any:
    return SimpleNamespace(**{name: getattr(ops, name) for name in ops.__all__} | changed)


# ---- shard


@dataclass(frozen=True, slots=True)
class VocabPart:
    """The rows of the embedding or of the lm_head that one rank holds."""

    rows: Array
    first: int  # the token of its first row


def cut(param: Param, weight: Array, rank: int) -> Array | VocabPart:
    """The part of `weight` that `rank` holds, by nothing but its declaration."""
    if param.shard == "replicated":
        return weight
    if param.shard == "row" and weight.ndim == 1:  # added to a partial sum: once
        return weight if rank == 0 else np.zeros_like(weight)
    axis = 1 if param.shard == "row" else 0
    part = np.split(weight, NUM_RANKS, axis)[rank]
    return VocabPart(part, rank * len(part)) if param.shard == "vocab" else part


class Ranks:
    """Two ranks in lockstep, a thread each. They meet in `exchange` alone."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(NUM_RANKS)
        self._parts: list[Any] = [None] * NUM_RANKS

    def run(self, rank_of: Callable[[int], Array]) -> list[Array]:
        """What each rank returns. An error of one ends all."""
        results: list[Any] = [None] * NUM_RANKS

        def work(rank: int) -> None:
            try:
                results[rank] = rank_of(rank)
            except BaseException as error:
                results[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(NUM_RANKS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [result for result in results if isinstance(result, BaseException)]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return results

    def exchange(self, rank: int, part: Array) -> list[Array]:
        """The parts of all ranks, in rank order."""
        self._parts[rank] = part
        self._barrier.wait()
        parts = list(self._parts)
        self._barrier.wait()
        return parts

    def ops(self, ops: Any, rank: int) -> Any:
        """The ops of one rank: sums in rank order, and a vocabulary that is held in parts."""

        def all_reduce(x: Array) -> Array:
            total, *others = self.exchange(rank, x)
            for other in others:
                total = total + other
            return total

        def embedding(table: Any, ids: NDArray[np.int32], scale: float = 1.0) -> Array:
            if not isinstance(table, VocabPart):
                return np.asarray(ops.embedding(table, ids, scale))
            here = (ids >= table.first) & (ids < table.first + len(table.rows))
            rows = ops.embedding(table.rows, np.where(here, ids - table.first, 0), scale)
            return all_reduce(np.where(here[:, None], rows, np.float32(0)))

        def linear(x: Array, weight: Any, bias: Array | None = None) -> Array:
            if not isinstance(weight, VocabPart):
                return np.asarray(ops.linear(x, weight, bias))
            return np.concatenate(self.exchange(rank, ops.linear(x, weight.rows, bias)), axis=1)

        return with_ops(ops, all_reduce=all_reduce, embedding=embedding, linear=linear)


def split_forward(loaded: Loaded) -> Callable[..., Array]:
    """A forward pass over two ranks, each with its weights, caches and heads."""
    config = loaded.config
    own = replace(
        config,
        num_heads=config.num_heads // NUM_RANKS,
        num_kv_heads=config.num_kv_heads // NUM_RANKS,
        intermediate_size=config.intermediate_size // NUM_RANKS,
    )
    params, own_params = declared(config), declared(own)
    weights: list[dict[str, Any]] = []
    caches: list[list[KVLayer]] = []
    for rank in range(NUM_RANKS):
        weights.append({name: cut(p, loaded.weights[name], rank) for name, p in params.items()})
        for name, part in weights[rank].items():  # the smaller config declares these very shapes
            assert isinstance(part, VocabPart) or part.shape == own_params[name].shape, name
        specs = build_kv_specs(own, *choose_kv_dtypes("auto", loaded.backend.kv_dtypes))
        size = BLOCK_SIZES[loaded.backend.name]
        caches.append([KVLayer(loaded.backend.new_kv_store(NUM_BLOCKS, size, s)) for s in specs])

    def forward(
        ops: Any,
        config: ModelConfig,
        whole: Mapping[str, Array],
        batch: ForwardBatch,
        kv_layers: Sequence[KVLayer],
    ) -> Array:
        ranks, graph = Ranks(), get_graph(own.graph)

        def run_rank(rank: int) -> Array:
            rank_ops = ranks.ops(ops, rank)
            return np.asarray(graph.forward(rank_ops, own, weights[rank], batch, caches[rank]))

        first, second = ranks.run(run_rank)
        np.testing.assert_array_equal(first, second)
        return first

    return forward


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_a_model_cut_for_two_ranks_gives_the_logits_of_one(name: str) -> None:
    loaded = load(GOLDEN / name, "reference")
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"]
    found = run_steps(Session(loaded, NUM_BLOCKS, forward=split_forward(loaded)), input_ids)
    check_close(found, run_steps(Session(loaded), input_ids))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_most_of_a_model_is_cut(name: str) -> None:
    """Only norms, learned positions and biases of sums are held whole by each rank."""
    with_whole = {
        p.name
        for p in declared(load(GOLDEN / name, "reference").config).values()
        if p.shard == "replicated"
    }
    assert all("norm" in whole or whole == "embed_positions.weight" for whole in with_whole)


# ---- group, quantizable


@dataclass(slots=True)
class Hessian:
    """What GPTQ needs of the input of a group of weights: X·Xᵀ over all its rows."""

    total: NDArray[np.float64]  # [in, in]
    rows: int = 0


class Calibration:
    """Collects one Hessian per group while a model runs, from a wrapper of its ops. Weights of one
    group share it, so their input must be the very same array.
    """

    def __init__(self, loaded: Loaded) -> None:
        params = declared(loaded.config)
        self._params = {id(loaded.weights[name]): param for name, param in params.items()}
        self.hessians: dict[str, Hessian] = {}
        self.uses: dict[str, int] = {}  # rows that each linear weight has seen
        self._seen: dict[str, Array] = {}  # the last input of each group

    def ops(self, ops: Any) -> Any:
        def linear(x: Array, weight: Array, bias: Array | None = None) -> Any:
            param = self._params[id(weight)]
            assert param.group is not None and param.quantizable, param.name
            self.uses[param.name] = self.uses.get(param.name, 0) + len(x)
            if self._seen.get(param.group) is not x:
                self._seen[param.group] = x
                size = x.shape[1]
                own = self.hessians.setdefault(param.group, Hessian(np.zeros((size, size))))
                own.total += x.astype(np.float64).T @ x
                own.rows += len(x)
            return ops.linear(x, weight, bias)

        return with_ops(ops, linear=linear)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_each_group_of_weights_sees_each_token_once(name: str) -> None:
    """Every linear weight has a group, and a group's weights share one input per token: so its
    Hessian counts as many rows as there are tokens, however many weights it has.
    """
    loaded = load(GOLDEN / name, "reference")
    params = declared(loaded.config)
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"]
    calibration = Calibration(loaded)
    run_steps(Session(loaded, change_ops=calibration.ops), input_ids)
    grouped = {param.name: param.group for param in params.values() if param.group is not None}
    assert calibration.uses == dict.fromkeys(grouped, len(input_ids))
    assert calibration.hessians.keys() == set(grouped.values())
    for group, hessian in calibration.hessians.items():
        assert hessian.rows == len(input_ids), group
        (width,) = {params[n].shape[1] for n, g in grouped.items() if g == group}
        assert hessian.total.shape == (width, width) and np.trace(hessian.total) > 0
    # what may be quantized is a matrix: of a group, or the embedding that rows are taken from
    quantizable = {param.name for param in params.values() if param.quantizable}
    assert quantizable == grouped.keys() | {"embed_tokens.weight"}
