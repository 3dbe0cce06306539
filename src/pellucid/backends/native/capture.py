"""Capture: run a forward pass once over symbols, and record the list of kernel calls.

A model's forward pass is the same list of ops at every step; only the number of tokens differs. So
it is recorded once, from the Python code over `Ops`, and replayed in C++ without Python between the
ops. A `Symbol` is a tensor whose number of rows is not known yet.

No weights are needed: a `TensorSpec` may replace each weight and a `KVSpec` each cache. Such a list
cannot run, but it has the memory plan (`plan.py`) and the costs (`costs.py`) of the model.

Linear layers with quantized weights read activations in 8 bits. An entry that quantizes a symbol is
added before its first product, and all its products share the result, unless the inputs of their
weights lie in different orders. `plan.py` places the symbols
in memory and the barriers between entries.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from ... import _native
from ...batch import AttentionMetadata, ForwardBatch
from ...errors import UnsupportedError
from ...formats import format_of_number, get_format
from ...formats.groups import INT8_ROW
from ...formats.tensor import TensorSpec
from ...kv_spec import KVSpec
from ...ops.backend import Forward
from ...ops.protocol import KVLayer, RopeTable
from .kv_store import KVStore

__all__ = [
    "OPS",
    "Cache",
    "Capture",
    "Entry",
    "Recorder",
    "Rows",
    "Symbol",
    "capture",
    "kv_spec_of",
    "spec_of",
]

Matrix: TypeAlias = _native.Weight | TensorSpec
Vector: TypeAlias = _native.Vector | TensorSpec
Cache: TypeAlias = KVStore | KVSpec
Attribute: TypeAlias = int | float | tuple[float, ...]

# Name -> (how it divides the rows, the names of its attributes), as csrc/ops.inc declares them.
OPS = _native.ops()


class Rows(enum.IntEnum):
    """What the rows of a tensor are: the batch's tokens, its `logits_indices` or its
    `hidden_indices`. The numbers are those of csrc/program.h.
    """

    TOKENS = 0
    LOGITS = 1
    HIDDEN = 2


@dataclass(eq=False, slots=True)
class Symbol:
    """A tensor of `width` numbers per row."""

    width: int
    rows: Rows = Rows.TOKENS
    quantized: bool = False
    num_heads: int = 1  # how `width` is seen by ops on heads
    base: "Symbol | None" = None  # the symbol whose memory this one uses

    @property
    def storage(self) -> "Symbol":
        """The symbol that owns the memory."""
        return self if self.base is None else self.base.storage


@dataclass(slots=True)
class Entry:
    """One kernel call: an op of `OPS`, and a value for each attribute that the op declares."""

    op: str
    inputs: list[Symbol]
    output: Symbol | None
    weight: Matrix | None = None
    vectors: list[Vector] = field(default_factory=list)
    kv: Cache | None = None
    attributes: Mapping[str, Attribute] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if set(self.attributes) != set(OPS[self.op][1]):
            raise AssertionError(
                f"{self.op} has the attributes {OPS[self.op][1]}, and is given {self.attributes}"
            )


@dataclass(frozen=True, slots=True)
class _Input:
    """An integer array of the batch, represented by its name."""

    name: str


def spec_of(weight: Matrix | Vector) -> TensorSpec:
    """Format and shape of a parameter, loaded or declared."""
    if isinstance(weight, TensorSpec):
        return weight
    if isinstance(weight, _native.Vector):
        return TensorSpec("F32", (weight.size,))
    format = format_of_number(weight.ggml_type).name
    return TensorSpec(format, (weight.outputs, weight.inputs), bool(weight.order))


def kv_spec_of(cache: Cache) -> KVSpec:
    """The declaration of a cache, allocated or not."""
    return cache if isinstance(cache, KVSpec) else cache.spec


@dataclass(frozen=True, slots=True)
class Capture:
    """A forward pass as a list of entries, in order, and the symbols of its results."""

    entries: list[Entry]
    result: Symbol
    hidden: Symbol | None = None  # the hidden states, if it returns them beside the logits

    @property
    def results(self) -> list[Symbol]:
        """The symbols that lie in the caller's memory."""
        return [self.result] if self.hidden is None else [self.result, self.hidden]


def capture(forward: Forward) -> Capture:
    """Run a forward pass over symbols."""
    recorder = Recorder()
    metadata = AttentionMetadata(  # kernels take the block size from the cache
        _Input("cu_seqlens_q"),
        _Input("seq_lens"),
        _Input("block_tables"),
        _Input("slot_mapping"),
        block_size=0,
    )
    batch = ForwardBatch(
        _Input("input_ids"),
        _Input("positions"),
        _Input("logits_indices"),
        _Input("hidden_indices"),
        metadata,
    )
    found = forward(recorder, batch)
    result, hidden = found if isinstance(found, tuple) else (found, None)
    _cap_in_place(recorder.entries, result)
    return Capture(recorder.entries, result, hidden)


def _cap_in_place(entries: list[Entry], result: Symbol) -> None:
    """Let a softcap overwrite its input if no later entry reads it, because logits are large."""
    last_read = {symbol.storage: entry for entry in entries for symbol in entry.inputs}
    for entry in [e for e in entries if e.op == "softcap" and last_read[e.inputs[0].storage] is e]:
        if entry.output is not None and entry.inputs[0].storage is not result.storage:
            entry.output.base = entry.inputs[0]


class Recorder:
    """Implements `ops.protocol.Ops` by recording each call."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self._quantized: dict[tuple[Symbol, bool, bytes], Symbol] = {}
        self._angles: dict[RopeTable, Symbol] = {}

    def _add(
        self,
        op: str,
        inputs: list[Symbol],
        output: Symbol,
        *,
        weight: Matrix | None = None,
        vectors: list[Vector] | None = None,
        kv: Cache | None = None,
        **attributes: Attribute,
    ) -> Symbol:
        self.entries.append(Entry(op, inputs, output, weight, vectors or [], kv, attributes))
        return output

    def embedding(self, table: Matrix, input_ids: _Input, scale: float = 1.0) -> Symbol:
        learned = {"input_ids": 0, "positions": 1}[input_ids.name]
        output = Symbol(spec_of(table).shape[1])
        return self._add("embed", [], output, weight=table, learned=learned, scale=scale)

    def linear(self, x: Symbol, weight: Matrix, bias: Vector | None = None) -> Symbol:
        spec = spec_of(weight)
        outputs, inputs = spec.shape
        if x.width != inputs:
            raise AssertionError(f"a linear layer of {inputs} inputs is given {x.width}")
        source = self._quantize(x, weight) if get_format(spec.format).block_size > 1 else x
        vectors = [] if bias is None else [bias]
        output = Symbol(outputs, x.rows)
        return self._add("linear", [source], output, weight=weight, vectors=vectors)

    def _quantize(self, x: Symbol, weight: Matrix) -> Symbol:
        """`x` in 8 bits, with a scale per 32 inputs, or per row for INT8_ROW, and in the order of
        the weight's inputs. Weights that share an order share the result; a declared weight is
        taken to have that of the others.
        """
        by_rows = spec_of(weight).format == INT8_ROW
        order = weight.order if isinstance(weight, _native.Weight) else bytes(weight.permuted)
        key = (x.storage, by_rows, order)
        if key not in self._quantized:
            output = Symbol(x.width, x.rows, quantized=True)
            if by_rows:
                self._quantized[key] = self._add("quantize_rows", [x], output)
                return output
            ordered = weight if spec_of(weight).permuted else None
            self._quantized[key] = self._add("quantize", [x], output, weight=ordered)
        return self._quantized[key]

    def rms_norm(self, x: Symbol, weight: Vector, eps: float) -> Symbol:
        return self._norm("rms_norm", x, [weight], eps)

    def layer_norm(self, x: Symbol, weight: Vector, bias: Vector, eps: float) -> Symbol:
        return self._norm("layer_norm", x, [weight, bias], eps)

    def _norm(self, op: str, x: Symbol, vectors: list[Vector], eps: float) -> Symbol:
        width = x.width // x.num_heads
        if any(spec_of(v).shape != (width,) for v in vectors):
            raise AssertionError(
                f"a norm over {width} numbers has weights of {[spec_of(v).shape for v in vectors]}"
            )
        return self._add(op, [x], _like(x), vectors=vectors, width=width, eps=eps)

    def add(self, x: Symbol, y: Symbol) -> Symbol:
        return self._add("add", [x, y], _like(x))

    def silu_mul(self, gate: Symbol, up: Symbol) -> Symbol:
        return self._add("silu_mul", [gate, up], _like(gate))

    def gelu_mul(self, gate: Symbol, up: Symbol) -> Symbol:
        return self._add("gelu_mul", [gate, up], _like(gate))

    def gelu(self, x: Symbol) -> Symbol:
        return self._add("gelu", [x], _like(x))

    def softcap(self, x: Symbol, cap: float) -> Symbol:
        return self._add("softcap", [x], _like(x), cap=cap)

    def split_heads(self, x: Symbol, num_heads: int) -> Symbol:
        return Symbol(x.width, x.rows, num_heads=num_heads, base=x)

    def rope(self, x: Symbol, positions: _Input, table: RopeTable) -> Symbol:
        """The angles of a step are computed once for all layers with the same frequencies."""
        if table not in self._angles:
            output = Symbol(2 * len(table.inv_freq))
            self._angles[table] = self._add(
                "rope_angles", [], output, scale=table.scale, inv_freq=table.inv_freq
            )
        heads, head_dim = x.num_heads, x.width // x.num_heads
        inputs = [x, self._angles[table]]
        return self._add("rope", inputs, _like(x), heads=heads, head_dim=head_dim)

    def kv_write(self, kv: KVLayer, k: Symbol, v: Symbol, slot_mapping: _Input) -> None:
        entry = Entry("kv_write", [k, v], None, kv=kv.store, attributes={"group": kv.group})
        self.entries.append(entry)

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
        return self._add(
            "attention",
            [q],
            Symbol(q.width, num_heads=1),
            kv=kv.store,
            heads=q.num_heads,
            head_dim=q.width // q.num_heads,
            window=window or 0,
            group=kv.group,
            scale=scale,
            cap=softcap or 0.0,
        )

    def take_rows(self, x: Symbol, indices: _Input) -> Symbol:
        taken = {"logits_indices": Rows.LOGITS, "hidden_indices": Rows.HIDDEN}
        if indices.name not in taken:
            raise UnsupportedError(
                f"the native backend takes the rows of {' or '.join(taken)}, not of {indices.name}"
            )
        return self._add("take_rows", [x], Symbol(x.width, taken[indices.name]))

    def all_reduce(self, x: Symbol) -> Symbol:
        return x  # one rank


def _like(x: Symbol) -> Symbol:
    return Symbol(x.width, x.rows, num_heads=x.num_heads)
