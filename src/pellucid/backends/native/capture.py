"""Capture: run a forward pass once over symbols, and keep the list of kernel calls that it made.

One idea: a model's forward pass is the same list of ops at every step; only the number of tokens
differs. So it is written once, in Python, over `Ops`, and replayed in C++ without Python between
the ops. A `Symbol` is a tensor whose rows are not known yet.

Linear layers with quantized weights read activations in 8 bits: an entry that quantizes is put in
where a symbol is first multiplied, and shared by all that multiply it. `plan.py` places the symbols
in memory and finds where threads must wait for each other.
"""

import enum
from dataclasses import dataclass, field
from typing import Any

from ... import _native
from ...batch import AttentionMetadata, ForwardBatch
from ...errors import UnsupportedError
from ...ops.protocol import Forward, KVLayer, RopeTable

__all__ = ["Entry", "Op", "Recorder", "Symbol", "capture"]


class Op(enum.IntEnum):
    """The entries of a program, numbered as csrc/program.h numbers them."""

    EMBED = 0
    QUANTIZE = 1
    LINEAR = 2
    RMS_NORM = 3
    LAYER_NORM = 4
    ADD = 5
    SILU_MUL = 6
    GELU_MUL = 7
    SOFTCAP = 8
    ROPE_ANGLES = 9
    ROPE = 10
    KV_WRITE = 11
    ATTENTION = 12
    TAKE_ROWS = 13


@dataclass(eq=False, slots=True)
class Symbol:
    """A tensor of `width` numbers per row; rows are the batch's tokens, or its wanted logits."""

    width: int
    logits_rows: bool = False
    quantized: bool = False
    num_heads: int = 1  # how `width` is seen by ops on heads
    base: "Symbol | None" = None  # the symbol whose memory this one shares

    @property
    def storage(self) -> "Symbol":
        """The symbol that owns the memory."""
        return self if self.base is None else self.base.storage


@dataclass(slots=True)
class Entry:
    """One kernel call. What the lists hold is said op by op in csrc/program.h."""

    op: Op
    inputs: list[Symbol]
    output: Symbol | None
    weight: "_native.Weight | None" = None
    vectors: list["_native.Vector"] = field(default_factory=list)
    kv: "_native.KVStore | None" = None
    ints: list[int] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Input:
    """An integer array of the batch, by name."""

    name: str


def capture(forward: Forward, recorder: "Recorder | None" = None) -> tuple[list[Entry], Symbol]:
    """The entries of a forward pass, in order, and the symbol that is its result."""
    recorder = recorder or Recorder()
    metadata = AttentionMetadata(  # a kernel takes the block size from its cache
        _Input("cu_seqlens_q"),
        _Input("seq_lens"),
        _Input("block_tables"),
        _Input("slot_mapping"),
        block_size=0,
    )
    batch = ForwardBatch(
        _Input("input_ids"), _Input("positions"), _Input("logits_indices"), metadata
    )
    result: Symbol = forward(recorder, batch)
    _cap_in_place(recorder.entries, result)
    return recorder.entries, result


def _cap_in_place(entries: list[Entry], result: Symbol) -> None:
    """Let a softcap write over its input, where nobody reads that later: logits are as wide as the
    vocabulary.
    """
    last_read = {symbol.storage: entry for entry in entries for symbol in entry.inputs}
    for entry in [e for e in entries if e.op is Op.SOFTCAP and last_read[e.inputs[0].storage] is e]:
        if entry.output is not None and entry.inputs[0].storage is not result.storage:
            entry.output.base = entry.inputs[0]


class Recorder:
    """Implements `ops.protocol.Ops` by writing down what is asked."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._quantized: dict[Symbol, Symbol] = {}
        self._angles: dict[RopeTable, Symbol] = {}

    def _add(self, op: Op, inputs: list[Symbol], output: Symbol, **parts: Any) -> Symbol:
        self.entries.append(Entry(op, inputs, output, **parts))
        return output

    def embedding(self, table: "_native.Weight", input_ids: _Input, scale: float = 1.0) -> Symbol:
        which = {"input_ids": 0, "positions": 1}[input_ids.name]
        return self._add(
            Op.EMBED, [], Symbol(table.inputs), weight=table, ints=[which], floats=[scale]
        )

    def linear(
        self, x: Symbol, weight: "_native.Weight", bias: "_native.Vector | None" = None
    ) -> Symbol:
        if x.width != weight.inputs:
            raise AssertionError(f"a linear layer of {weight.inputs} inputs is given {x.width}")
        source = self._quantize(x) if weight.quantized else x
        output = Symbol(weight.outputs, x.logits_rows)
        return self._add(
            Op.LINEAR, [source], output, weight=weight, vectors=[] if bias is None else [bias]
        )

    def _quantize(self, x: Symbol) -> Symbol:
        if x.storage not in self._quantized:
            output = Symbol(x.width, x.logits_rows, quantized=True)
            self._quantized[x.storage] = self._add(Op.QUANTIZE, [x], output)
        return self._quantized[x.storage]

    def rms_norm(self, x: Symbol, weight: "_native.Vector", eps: float) -> Symbol:
        return self._norm(Op.RMS_NORM, x, [weight], eps)

    def layer_norm(
        self, x: Symbol, weight: "_native.Vector", bias: "_native.Vector", eps: float
    ) -> Symbol:
        return self._norm(Op.LAYER_NORM, x, [weight, bias], eps)

    def _norm(self, op: Op, x: Symbol, vectors: list["_native.Vector"], eps: float) -> Symbol:
        width = x.width // x.num_heads
        if any(v.size != width for v in vectors):
            raise AssertionError(
                f"a norm over {width} numbers has weights of {[v.size for v in vectors]}"
            )
        return self._add(op, [x], _like(x), vectors=vectors, ints=[width], floats=[eps])

    def add(self, x: Symbol, y: Symbol) -> Symbol:
        return self._add(Op.ADD, [x, y], _like(x))

    def silu_mul(self, gate: Symbol, up: Symbol) -> Symbol:
        return self._add(Op.SILU_MUL, [gate, up], _like(gate))

    def gelu_mul(self, gate: Symbol, up: Symbol) -> Symbol:
        return self._add(Op.GELU_MUL, [gate, up], _like(gate))

    def gelu(self, x: Symbol) -> Symbol:
        return self._add(Op.GELU_MUL, [x], _like(x))

    def softcap(self, x: Symbol, cap: float) -> Symbol:
        return self._add(Op.SOFTCAP, [x], _like(x), floats=[cap])

    def split_heads(self, x: Symbol, num_heads: int) -> Symbol:
        return Symbol(x.width, x.logits_rows, num_heads=num_heads, base=x)

    def rope(self, x: Symbol, positions: _Input, table: RopeTable) -> Symbol:
        """The angles of a step are computed once, for all layers that turn alike."""
        if table not in self._angles:
            output = Symbol(2 * len(table.inv_freq))
            self._angles[table] = self._add(
                Op.ROPE_ANGLES, [], output, floats=[table.scale, *table.inv_freq]
            )
        return self._add(
            Op.ROPE, [x, self._angles[table]], _like(x), ints=[x.num_heads, x.width // x.num_heads]
        )

    def kv_write(self, kv: KVLayer, k: Symbol, v: Symbol, slot_mapping: _Input) -> None:
        self.entries.append(Entry(Op.KV_WRITE, [k, v], None, kv=kv.store, ints=[kv.group]))

    def attention(
        self,
        q: Symbol,
        kv: KVLayer,
        metadata: AttentionMetadata,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Symbol:
        ints = [q.num_heads, q.width // q.num_heads, window or 0, kv.group]
        return self._add(
            Op.ATTENTION,
            [q],
            Symbol(q.width, num_heads=1),
            kv=kv.store,
            ints=ints,
            floats=[scale, softcap or 0.0],
        )

    def take_rows(self, x: Symbol, indices: _Input) -> Symbol:
        if indices.name != "logits_indices":
            raise UnsupportedError(
                f"the native backend takes the rows of logits_indices, not of {indices.name}"
            )
        return self._add(Op.TAKE_ROWS, [x], Symbol(x.width, logits_rows=True))

    def all_reduce(self, x: Symbol) -> Symbol:
        return x  # one rank


def _like(x: Symbol) -> Symbol:
    return Symbol(x.width, x.logits_rows, num_heads=x.num_heads)
