"""The conformance cases: each is plain data that names an op, its shapes and its options.

`build_case.py` runs a case on a backend, and `scripts/bench_kernels.py` times it and uses its FLOPs
and bytes. The lists of cases are in `case_lists.py`. Shapes: T tokens, R requests, M blocks per
request, H query heads, KH key heads, D head_dim.
"""

import inspect
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol

import numpy as np

from ..batch import ForwardBatch
from ..formats import encode_dense
from . import cost
from .case_inputs import Inputs, build_attention_batch, normal, plain_batch, random_weight
from .cost import OpCost
from .protocol import KVLayer, Ops, RopeTable, Tensor

__all__ = [
    "AttentionCase",
    "Case",
    "ElementwiseCase",
    "EmbeddingCase",
    "LinearCase",
    "NormCase",
    "RopeCase",
    "TakeRowsCase",
]


class Case(Protocol):
    """One case of the suite."""

    @property
    def op(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def cost(self) -> OpCost: ...

    def build_inputs(self) -> Inputs: ...

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        """Run the op; x holds the loaded weights and the activations by name."""
        ...


def _generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(case.name.encode()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCase:
    """Rows of a table in a format."""

    tokens: int
    vocab_size: int
    hidden_size: int
    format: str = "F32"
    scale: float = 1.0
    op: ClassVar[str] = "embedding"

    @property
    def name(self) -> str:
        sizes = f"T={self.tokens} V={self.vocab_size} C={self.hidden_size}"
        return f"embedding {sizes} {self.format} scale={self.scale:g}"

    @property
    def cost(self) -> OpCost:
        return cost.embedding(
            self.tokens, self.hidden_size, format=self.format, scaled=self.scale != 1.0
        )

    def build_inputs(self) -> Inputs:
        rng = _generator(self)
        batch = replace(
            plain_batch(self.tokens),
            input_ids=rng.integers(0, self.vocab_size, self.tokens, dtype=np.int32),
        )
        return Inputs(
            batch,
            weights={"table": random_weight(rng, (self.vocab_size, self.hidden_size), self.format)},
        )

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        return ops.embedding(x["table"], batch.input_ids, self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearCase:
    """A product with a weight in a format. With `logits_indices`, an lm_head over those rows; there
    may be none.
    """

    tokens: int
    in_features: int
    out_features: int
    format: str = "F32"
    bias: bool = False
    magnitude: float = 1.0
    logits_indices: tuple[int, ...] | None = None
    op: ClassVar[str] = "linear"

    @property
    def name(self) -> str:
        options = " bias" * self.bias + f" x={self.magnitude:g}" * (self.magnitude != 1.0)
        rows = "" if self.logits_indices is None else f" rows={list(self.logits_indices)}"
        sizes = f"T={self.tokens} {self.in_features}->{self.out_features}"
        return f"linear {sizes} {self.format}{options}{rows}"

    @property
    def cost(self) -> OpCost:
        if self.logits_indices is None:
            return cost.linear(
                self.tokens, self.in_features, self.out_features, format=self.format, bias=self.bias
            )
        rows = len(self.logits_indices)
        head = cost.linear(
            rows, self.in_features, self.out_features, format=self.format, bias=self.bias
        )
        return cost.take_rows(rows, self.in_features) + head

    def build_inputs(self) -> Inputs:
        rng = _generator(self)
        weights = {"weight": random_weight(rng, (self.out_features, self.in_features), self.format)}
        if self.bias:
            weights["bias"] = encode_dense(normal(rng, self.out_features))
        activations = {"x": normal(rng, self.tokens, self.in_features, magnitude=self.magnitude)}
        return Inputs(plain_batch(self.tokens, self.logits_indices or ()), weights, activations)

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        rows = (
            x["x"] if self.logits_indices is None else ops.take_rows(x["x"], batch.logits_indices)
        )
        return ops.linear(rows, x["weight"], x["bias"] if self.bias else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCase:
    """A norm over the hidden size, or over each head if `num_heads` is given."""

    op: Literal["rms_norm", "layer_norm"]
    tokens: int
    width: int
    num_heads: int | None = None
    eps: float = 1e-5
    magnitude: float = 1.0
    mean: float = 0.0

    @property
    def name(self) -> str:
        heads = "" if self.num_heads is None else f"H={self.num_heads} "
        numbers = f"eps={self.eps:g} x={self.magnitude:g} mean={self.mean:g}"
        return f"{self.op} T={self.tokens} {heads}C={self.width} {numbers}"

    @property
    def cost(self) -> OpCost:
        rows = self.tokens * (self.num_heads or 1)
        return (
            cost.rms_norm(rows, self.width)
            if self.op == "rms_norm"
            else cost.layer_norm(rows, self.width)
        )

    def build_inputs(self) -> Inputs:
        rng = _generator(self)
        weights = {"weight": encode_dense(normal(rng, self.width, mean=1.0))}
        if self.op == "layer_norm":
            weights["bias"] = encode_dense(normal(rng, self.width))
        x = normal(
            rng,
            self.tokens,
            self.width * (self.num_heads or 1),
            magnitude=self.magnitude,
            mean=self.mean,
        )
        return Inputs(plain_batch(self.tokens), weights, {"x": x})

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        rows = x["x"] if self.num_heads is None else ops.split_heads(x["x"], self.num_heads)
        if self.op == "rms_norm":
            return ops.rms_norm(rows, x["weight"], self.eps)
        return ops.layer_norm(rows, x["weight"], x["bias"], self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseCase:
    """An elementwise op with one or two inputs; also all_reduce, which has one rank here."""

    op: str
    tokens: int
    width: int
    magnitude: float = 1.0
    cap: float = 30.0  # softcap's

    @property
    def name(self) -> str:
        return (
            f"{self.op} T={self.tokens} F={self.width} x={self.magnitude:g}"
            + f" cap={self.cap:g}" * (self.op == "softcap")
        )

    @property
    def cost(self) -> OpCost:
        function: Callable[[int, int], OpCost] = vars(cost)[self.op]
        return function(self.tokens, self.width)

    def build_inputs(self) -> Inputs:
        rng = _generator(self)
        shape = (self.tokens, self.width)
        activations = {"x": normal(rng, *shape, magnitude=self.magnitude)}
        if self._num_inputs == 2:
            activations["y"] = normal(rng, *shape)
        return Inputs(plain_batch(self.tokens), activations=activations)

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        function: Callable[..., Tensor] = getattr(ops, self.op)
        inputs = [x[name] for name in ("x", "y")[: self._num_inputs]]
        return function(*inputs, self.cap) if self.op == "softcap" else function(*inputs)

    @property
    def _num_inputs(self) -> int:
        parameters = inspect.signature(getattr(Ops, self.op)).parameters
        return len(parameters) - 1 - ("cap" in parameters)  # without self


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeRowsCase:
    """`take_rows` of some rows, rising, or of none."""

    tokens: int
    width: int
    indices: tuple[int, ...]
    op: ClassVar[str] = "take_rows"

    @property
    def name(self) -> str:
        return f"take_rows T={self.tokens} C={self.width} rows={list(self.indices)}"

    @property
    def cost(self) -> OpCost:
        return cost.take_rows(len(self.indices), self.width)

    def build_inputs(self) -> Inputs:
        x = normal(_generator(self), self.tokens, self.width)
        return Inputs(plain_batch(self.tokens, self.indices), activations={"x": x})

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        return ops.take_rows(x["x"], batch.logits_indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeCase:
    """RoPE on tokens from first_position on; `rotary_dim` may be less than head_dim."""

    tokens: int
    num_heads: int
    head_dim: int
    rotary_dim: int
    first_position: int = 0
    theta: float = 10_000.0
    scale: float = 1.0
    op: ClassVar[str] = "rope"

    @property
    def name(self) -> str:
        where = f"at={self.first_position} theta={self.theta:g} scale={self.scale:g}"
        sizes = f"T={self.tokens} H={self.num_heads} D={self.head_dim} rotary={self.rotary_dim}"
        return f"rope {sizes} {where}"

    @property
    def cost(self) -> OpCost:
        return cost.rope(self.tokens, self.num_heads, self.head_dim, self.rotary_dim)

    @property
    def table(self) -> RopeTable:
        return RopeTable(
            tuple(self.theta ** (-i / self.rotary_dim) for i in range(0, self.rotary_dim, 2)),
            self.scale,
        )

    def build_inputs(self) -> Inputs:
        x = normal(_generator(self), self.tokens, self.num_heads * self.head_dim)
        batch = replace(
            plain_batch(self.tokens),
            positions=np.arange(
                self.first_position, self.first_position + self.tokens, dtype=np.int32
            ),
        )
        return Inputs(batch, activations={"x": x})

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        return ops.rope(ops.split_heads(x["x"], self.num_heads), batch.positions, self.table)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Several requests. Request r computes the last q_lens[r] of its seq_lens[r] tokens: it writes
    their keys and values, then attends.
    """

    q_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16
    window: int | None = None
    softcap: float | None = None
    magnitude: float = 1.0  # of the queries: large ones make the softmax sharp
    kv_dtypes: tuple[str, str] | None = None  # of keys and of values; None: the backend's own
    # block tables are a random permutation; else the blocks of a request are consecutive
    scattered: bool = True
    op: ClassVar[str] = "attention"

    @property
    def name(self) -> str:
        options = f" window={self.window}" * (
            self.window is not None
        ) + f" softcap={self.softcap}" * (self.softcap is not None)
        options += (
            f" x={self.magnitude:g}" * (self.magnitude != 1.0) + " scattered" * self.scattered
        )
        options += "" if self.kv_dtypes is None else f" kv={','.join(self.kv_dtypes)}"
        heads = f"H={self.num_heads}/{self.num_kv_heads} D={self.head_dim} B={self.block_size}"
        return f"attention q={_short(self.q_lens)} seq={_short(self.seq_lens)} {heads}{options}"

    @property
    def cost(self) -> OpCost:
        heads = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        write = cost.kv_write(sum(self.q_lens), self.num_kv_heads, self.head_dim)
        return write + cost.attention(
            self.q_lens,
            self.seq_lens,
            window=self.window,
            softcap=self.softcap is not None,
            **heads,
        )

    def build_inputs(self) -> Inputs:
        rng = _generator(self)
        lengths = [-(-s // self.block_size) for s in self.seq_lens]  # blocks per request
        num_blocks = sum(lengths) + 1  # one that no request owns
        order = rng.permutation(num_blocks) if self.scattered else np.arange(num_blocks)
        tables = np.zeros((len(lengths), max(lengths)), np.int32)  # [R, M]
        for table, length, end in zip(tables, lengths, np.cumsum(lengths), strict=True):
            table[:length] = order[end - length : end]
        # this step's tokens
        tokens, width = sum(self.q_lens), self.num_kv_heads * self.head_dim
        activations = {
            "q": normal(rng, tokens, self.num_heads * self.head_dim, magnitude=self.magnitude),
            "k": normal(rng, tokens, width),
            "v": normal(rng, tokens, width),
        }
        earlier = [s - q for q, s in zip(self.q_lens, self.seq_lens, strict=True)]
        owners = [r for r, n in enumerate(earlier) if n]
        batch = build_attention_batch(self.q_lens, self.seq_lens, tables, self.block_size)
        if not owners:
            return Inputs(batch, activations=activations, num_blocks=num_blocks)
        # keys and values of earlier steps
        lens = [earlier[r] for r in owners]
        history = {name: normal(rng, sum(lens), width) for name in ("k", "v")}
        history_batch = build_attention_batch(lens, lens, tables[owners], self.block_size)
        return Inputs(batch, {}, activations, history, history_batch, num_blocks)

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        k, v = (ops.split_heads(x[name], self.num_kv_heads) for name in ("k", "v"))
        ops.kv_write(kv, k, v, batch.attention.slot_mapping)
        q = ops.split_heads(x["q"], self.num_heads)
        return ops.attention(
            q,
            kv,
            batch.attention,
            scale=self.head_dim**-0.5,
            window=self.window,
            softcap=self.softcap,
        )


def _short(lengths: Sequence[int]) -> str:
    return ",".join(map(str, lengths)) if len(lengths) <= 6 else f"{lengths[0]}x{len(lengths)}"
