"""The conformance cases: each a row of plain data that says which op, on which shapes, with which
options.

One idea: a case never touches a backend's arrays. What varies from token to token enters as the
rows of an embedding table (input_ids 0 … T-1), weights enter through `load_weight`, and the op runs
inside `build_forward`. So the same case holds eager, captured and device backends to the same
definition, and `scripts/bench_kernels.py` times it with the FLOPs and bytes that it knows.

A case's inputs come from a generator seeded by its name: they are the same on every machine. The
lists of cases are in `case_lists.py`. Shapes: T tokens, R requests, M blocks per request, H query
heads, KH key heads, D head_dim.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..batch import AttentionMetadata, ForwardBatch
from ..formats import FORMATS, dequantize, encode_dense, quantize
from ..formats.tensor import HostTensor
from ..kv_spec import KVSpec
from . import cost
from .cost import OpCost
from .kv_dtypes import choose_kv_dtypes
from .protocol import Backend, KVLayer, Ops, RopeTable, Tensor

__all__ = [
    "AttentionCase",
    "Case",
    "ElementwiseCase",
    "EmbeddingCase",
    "Inputs",
    "LinearCase",
    "NormCase",
    "RopeCase",
    "TakeRowsCase",
    "build_attention_batch",
    "build_case",
    "random_weight",
]

Array: TypeAlias = NDArray[np.float32]

DENSE = ("F32", "F16", "BF16")

# Where a quant_block keeps its float16 scales. Its other bytes may be anything; these must be
# numbers of a sane size.
F16_SCALES: Mapping[str, tuple[int, ...]] = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a case runs on. `history` is keys and values of earlier steps, written before the op is
    run.
    """

    batch: ForwardBatch
    weights: Mapping[str, HostTensor] = field(default_factory=dict)
    activations: Mapping[str, Array] = field(default_factory=dict)  # each [T, n]
    # "k", "v": each [earlier tokens, KH·D]
    history: Mapping[str, Array] = field(default_factory=dict)
    history_batch: ForwardBatch | None = None
    num_blocks: int = 0


class Case(Protocol):
    """One row of the suite."""

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


def build_case(
    backend: Backend, case: Case, inputs: Inputs, *, repeats: int = 1
) -> Callable[[], Array]:
    """Make a case runnable on a backend. `repeats` runs the op so many times within one forward
    pass, to time it.
    """
    weights = {name: backend.load_weight(tensor) for name, tensor in inputs.weights.items()}
    tables = {
        name: backend.load_weight(encode_dense(rows)) for name, rows in inputs.activations.items()
    }
    kv = KVLayer(None)  # of cases that keep nothing
    if isinstance(case, AttentionCase):
        dtypes = case.kv_dtypes or choose_kv_dtypes("auto", backend.kv_dtypes)
        spec = KVSpec(case.num_kv_heads, case.head_dim, case.head_dim, *dtypes)
        kv = KVLayer(backend.new_kv_store(inputs.num_blocks, case.block_size, spec))
        if inputs.history_batch is not None:
            _write_history(backend, case, inputs, inputs.history_batch, kv)

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        x = weights | {
            name: ops.embedding(table, batch.input_ids) for name, table in tables.items()
        }
        for _ in range(repeats):
            out = case.apply(ops, x, batch, kv)
        return out

    run = backend.build_forward(forward)
    return lambda: run(inputs.batch).to_host()


def _write_history(
    backend: Backend,
    case: "AttentionCase",
    inputs: Inputs,
    history_batch: ForwardBatch,
    kv: KVLayer,
) -> None:
    tables = {
        name: backend.load_weight(encode_dense(rows)) for name, rows in inputs.history.items()
    }

    def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
        rows = {name: ops.embedding(table, batch.input_ids) for name, table in tables.items()}
        k, v = (ops.split_heads(rows[name], case.num_kv_heads) for name in ("k", "v"))
        ops.kv_write(kv, k, v, batch.attention.slot_mapping)
        return rows["k"]

    backend.build_forward(forward)(history_batch)


def build_attention_batch(
    q_lens: Sequence[int],
    seq_lens: Sequence[int],
    block_tables: NDArray[np.int32],
    block_size: int,
    logits_indices: Sequence[int] = (),
) -> ForwardBatch:
    """The batch in which request r computes its last q_lens[r] tokens of seq_lens[r]; input_ids are
    0 … T-1.

    block_tables are [G, R, M], or [R, M] of one group.
    """
    tables = block_tables if block_tables.ndim == 3 else block_tables[None]
    owner = np.repeat(np.arange(len(q_lens)), q_lens)  # [T]
    # [T]
    positions = np.concatenate([np.arange(s - q, s) for q, s in zip(q_lens, seq_lens, strict=True)])
    # [G, T]
    slots = tables[:, owner, positions // block_size] * block_size + positions % block_size
    return ForwardBatch(
        input_ids=np.arange(len(owner), dtype=np.int32),
        positions=positions.astype(np.int32),
        logits_indices=np.array(logits_indices, np.int32),
        attention=AttentionMetadata(
            cu_seqlens_q=np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
            seq_lens=np.array(seq_lens, np.int32),
            block_tables=tables,
            slot_mapping=slots.astype(np.int32),
            block_size=block_size,
        ),
    )


def _plain_batch(tokens: int, logits_indices: Sequence[int] = ()) -> ForwardBatch:
    """One request, whole: for ops that do not look at other tokens."""
    return build_attention_batch(
        [tokens], [tokens], np.zeros((1, 1), np.int32), tokens, logits_indices
    )


def random_weight(rng: np.random.Generator, shape: tuple[int, int], format: str) -> HostTensor:
    """A matrix [out, in], its numbers about 1/sqrt(in) in size. Quantized blocks hold random bytes,
    so that every code occurs.
    """
    rows, columns = shape
    spread = columns**-0.5
    if format in DENSE:
        return quantize((rng.normal(size=shape) * spread).astype(np.float32), format)
    layout = FORMATS[format]
    data = rng.integers(
        0, 256, (rows, columns // layout.block_size, layout.block_bytes), dtype=np.uint8
    )
    scales = (
        rng.uniform(0.5, 1.5, (*data.shape[:2], len(F16_SCALES[format])))
        * rng.choice([-1, 1], data.shape[:2])[..., None]
    )
    _put_scales(data, format, scales)
    sample = data[:64].reshape(min(rows, 64), -1)
    rms = float(
        np.sqrt(
            np.mean(
                np.square(
                    dequantize(HostTensor(format, (len(sample), columns), sample)), dtype=np.float64
                )
            )
        )
    )
    _put_scales(data, format, scales * (spread / rms))  # a value is linear in its block's scales
    return HostTensor(format, shape, data.reshape(rows, -1))


def _put_scales(data: NDArray[np.uint8], format: str, scales: NDArray[np.float64]) -> None:
    """Write scales [rows, blocks, fields] where the format keeps them, as little-endian float16."""
    for i, at in enumerate(F16_SCALES[format]):
        data[..., at : at + 2] = np.ascontiguousarray(scales[..., i : i + 1], "<f2").view(np.uint8)


def _generator(case: Case) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(case.name.encode()))


def _normal(
    rng: np.random.Generator, *shape: int, magnitude: float = 1.0, mean: float = 0.0
) -> Array:
    return (rng.normal(size=shape) * magnitude + mean).astype(np.float32)


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
        return f"embedding T={self.tokens} V={self.vocab_size} C={self.hidden_size} {self.format} scale={self.scale:g}"

    @property
    def cost(self) -> OpCost:
        return cost.embedding(
            self.tokens, self.hidden_size, format=self.format, scaled=self.scale != 1.0
        )

    def build_inputs(self) -> Inputs:
        rng = _generator(self)
        batch = replace(
            _plain_batch(self.tokens),
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
    """A product with a weight in a format; with `logits_indices`, an lm_head over the rows that
    they take, of which there may be none.
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
        return f"linear T={self.tokens} {self.in_features}->{self.out_features} {self.format}{options}{rows}"

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
            weights["bias"] = encode_dense(_normal(rng, self.out_features))
        activations = {"x": _normal(rng, self.tokens, self.in_features, magnitude=self.magnitude)}
        return Inputs(_plain_batch(self.tokens, self.logits_indices or ()), weights, activations)

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        rows = (
            x["x"] if self.logits_indices is None else ops.take_rows(x["x"], batch.logits_indices)
        )
        return ops.linear(rows, x["weight"], x["bias"] if self.bias else None)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormCase:
    """A norm over the hidden size, or over each head where `num_heads` says so."""

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
        return f"{self.op} T={self.tokens} {heads}C={self.width} eps={self.eps:g} x={self.magnitude:g} mean={self.mean:g}"

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
        weights = {"weight": encode_dense(_normal(rng, self.width, mean=1.0))}
        if self.op == "layer_norm":
            weights["bias"] = encode_dense(_normal(rng, self.width))
        x = _normal(
            rng,
            self.tokens,
            self.width * (self.num_heads or 1),
            magnitude=self.magnitude,
            mean=self.mean,
        )
        return Inputs(_plain_batch(self.tokens), weights, {"x": x})

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        rows = x["x"] if self.num_heads is None else ops.split_heads(x["x"], self.num_heads)
        if self.op == "rms_norm":
            return ops.rms_norm(rows, x["weight"], self.eps)
        return ops.layer_norm(rows, x["weight"], x["bias"], self.eps)


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementwiseCase:
    """An op on each number by itself, with one or two inputs; and all_reduce, which has one rank
    here.
    """

    op: Literal["add", "silu_mul", "gelu_mul", "gelu", "softcap", "all_reduce"]
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
        activations = {"x": _normal(rng, *shape, magnitude=self.magnitude)}
        if self.op in ("add", "silu_mul", "gelu_mul"):
            activations["y"] = _normal(rng, *shape)
        return Inputs(_plain_batch(self.tokens), activations=activations)

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        match self.op:
            case "add":
                return ops.add(x["x"], x["y"])
            case "silu_mul":
                return ops.silu_mul(x["x"], x["y"])
            case "gelu_mul":
                return ops.gelu_mul(x["x"], x["y"])
            case "gelu":
                return ops.gelu(x["x"])
            case "softcap":
                return ops.softcap(x["x"], self.cap)
            case "all_reduce":
                return ops.all_reduce(x["x"])


@dataclass(frozen=True, slots=True, kw_only=True)
class TakeRowsCase:
    """Some rows, rising; or none."""

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
        x = _normal(_generator(self), self.tokens, self.width)
        return Inputs(_plain_batch(self.tokens, self.indices), activations={"x": x})

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        return ops.take_rows(x["x"], batch.logits_indices)


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeCase:
    """Tokens at first_position and on, each head turned; `rotary_dim` may be less than head_dim."""

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
        return f"rope T={self.tokens} H={self.num_heads} D={self.head_dim} rotary={self.rotary_dim} {where}"

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
        x = _normal(_generator(self), self.tokens, self.num_heads * self.head_dim)
        batch = replace(
            _plain_batch(self.tokens),
            positions=np.arange(
                self.first_position, self.first_position + self.tokens, dtype=np.int32
            ),
        )
        return Inputs(batch, activations={"x": x})

    def apply(self, ops: Ops, x: Mapping[str, Tensor], batch: ForwardBatch, kv: KVLayer) -> Tensor:
        return ops.rope(ops.split_heads(x["x"], self.num_heads), batch.positions, self.table)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Several requests, each computing its last q_lens[r] tokens of seq_lens[r]: their keys and
    values are written, then attended to.
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
    # block tables are a random permutation; else each request's blocks lie in a row
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
        num_blocks = sum(lengths) + 1  # one that nobody owns
        order = rng.permutation(num_blocks) if self.scattered else np.arange(num_blocks)
        tables = np.zeros((len(lengths), max(lengths)), np.int32)  # [R, M]
        for table, length, end in zip(tables, lengths, np.cumsum(lengths), strict=True):
            table[:length] = order[end - length : end]
        tokens, width = sum(self.q_lens), self.num_kv_heads * self.head_dim
        activations = {
            "q": _normal(rng, tokens, self.num_heads * self.head_dim, magnitude=self.magnitude),
            "k": _normal(rng, tokens, width),
            "v": _normal(rng, tokens, width),
        }
        earlier = [s - q for q, s in zip(self.q_lens, self.seq_lens, strict=True)]
        owners = [r for r, n in enumerate(earlier) if n]
        batch = build_attention_batch(self.q_lens, self.seq_lens, tables, self.block_size)
        if not owners:
            return Inputs(batch, activations=activations, num_blocks=num_blocks)
        lens = [earlier[r] for r in owners]
        history = {name: _normal(rng, sum(lens), width) for name in ("k", "v")}
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
