"""Runs a model over calibration text, layer by layer, and hands the inputs of its linear layers to
an observer.

Only one layer's weights are in memory at a time, beside the hidden states of all tokens. The caller
loads a layer, observes it, may put quantized weights in the place of its weights, and then advances
the hidden states through it. So the inputs of a layer can be those behind a prefix that is already
quantized, as error feedback needs them (GPTQ, Frantar et al., arXiv:2210.17323, section 4).

`Param.group` says which weights share an input. So this module has no knowledge of any model: each
group's input is observed once, however many weights multiply it. The forward pass is the reference
backend's, in float32 with BLAS.

Shapes: W windows of n tokens, T tokens of a step, C hidden. A window is a sequence of its own.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..backends.reference import ops as reference
from ..backends.registry import get_backend
from ..batch import AttentionMetadata, ForwardBatch
from ..config import ModelConfig
from ..errors import RequestError
from ..formats.finite import check_activation
from ..kv_spec import build_kv_specs
from ..models.params import Param, split_name
from ..models.registry import get_graph
from ..ops.protocol import KVLayer
from ..tokenizer import Tokenizer
from ..weights.checkpoint import Checkpoint

__all__ = ["Floats", "Load", "Observe", "Walk", "cut_calibration", "loader", "mean_hessian"]

Floats: TypeAlias = NDArray[np.float32]
# (the group, its input [T, in]); the array is only valid during the call
Observe: TypeAlias = Callable[[str, Floats], None]
# names of parameters -> these parameters
Load: TypeAlias = Callable[[Collection[str]], dict[str, Floats]]

STEP_TOKENS = 2048  # of a step: more are not faster
KEPT_BYTES = 256 << 20  # of results of a layer that its next run needs again
BLOCK_SIZE = 16  # of the KV cache, which holds the tokens of one step


def cut_calibration(
    tokenizer: Tokenizer, text: str, n_ctx: int = 512, max_windows: int | None = None
) -> NDArray[np.int32]:
    """Tokenize `text` and cut it into windows [W, n_ctx], as llama-imatrix does: if the model has a
    beginning-of-sequence token, it replaces the first token of each. The rest that fills no window
    is left out. Raises RequestError if the text fills none.
    """
    token_ids = np.array(tokenizer.encode(text.removesuffix("\n")), np.int32)
    count = len(token_ids) // n_ctx
    if count == 0:
        raise RequestError(
            f"the calibration text has {len(token_ids)} tokens; at least {n_ctx} are needed"
        )
    if max_windows is not None:
        count = min(count, max_windows)
    windows = token_ids[: count * n_ctx].reshape(count, n_ctx)
    if tokenizer.add_bos and tokenizer.bos_token_id is not None:
        windows[:, 0] = tokenizer.bos_token_id
    return windows


def loader(checkpoint: Checkpoint) -> Load:
    """Loads parameters of a model in float32, by canonical name."""
    backend, every = get_backend("reference"), checkpoint.specs().keys()

    def load(names: Collection[str]) -> dict[str, Floats]:
        return {
            name: backend.load_weight(tensor, name)
            for name, tensor in checkpoint.parameters(without=every - set(names))
        }

    return load


class Walk:
    """The hidden states of all windows, which move through the model layer by layer."""

    def __init__(self, config: ModelConfig, load: Load, windows: NDArray[np.int32]) -> None:
        """Embed the tokens of the windows [W, n]."""
        self.config = config
        self._load = load
        self._graph = get_graph(self.config.graph)
        self._windows = windows
        self._step = max(1, STEP_TOKENS // windows.shape[1])  # windows of a step
        self._specs = build_kv_specs(self.config, "f32", "f32")
        self._kept = _Kept()
        self._kept_for: Mapping[str, Floats] = {}  # norms and biases of that layer
        self._backend = get_backend("reference")
        self.params: dict[str, Param] = {p.name: p for p in self._graph.parameters(self.config)}
        # the parameters of the layers, and the others, which embedding and head read
        self._layers: list[list[str]] = [[] for _ in range(self.config.num_layers)]
        self._others: list[str] = []
        for name in self.params:
            layer = split_name(name)[0]
            (self._others if layer is None else self._layers[layer]).append(name)
        weights = load(self._others)
        self._hidden = np.empty((*windows.shape, self.config.hidden_size), np.float32)  # [W, n, C]
        for start in range(0, len(windows), self._step):
            batch = self._batch(start)
            x = self._graph.embed(reference, self.config, weights, batch)
            self._hidden[start : start + self._step] = x.reshape(-1, *self._hidden.shape[1:])

    @property
    def num_tokens(self) -> int:
        return self._windows.size

    def load_layer(self, layer: int) -> dict[str, Floats]:
        """The weights of a layer."""
        return self._load(self._layers[layer])

    def groups_of(self, layer: int, weights: Mapping[str, Floats]) -> list[str]:
        """The groups of a layer, in the order in which the forward pass reaches them."""
        groups: list[str] = []
        tap = _Tap(self.params, weights, lambda group, _: groups.append(group), None)
        self._step_layer(tap, layer, weights, 0, self._new_store(layer))
        return groups

    def run_layer(
        self,
        layer: int,
        weights: Mapping[str, Floats],
        observe: Observe | None = None,
        *,
        advance: bool = True,
        last_group: str | None = None,
    ) -> None:
        """Run all windows through a layer. `observe` gets the inputs of its groups. With `advance`
        the hidden states become those behind the layer.

        `last_group` ends each step after this group was observed, so that nothing is computed that
        nobody reads; the hidden states must then stay. What was computed is kept for the next run
        of this layer, while it fits, and used again up to the first weight that has changed.

        Raises FormatError if a hidden state behind the layer is NaN or infinite.
        """
        tap = _Tap(self.params, weights, observe, last_group)
        for start, x in self._steps(tap, layer, weights, keeps=last_group is not None):
            if advance and x is not None:
                self._advance(layer, start, x)
        if advance:
            self._kept, self._kept_for = _Kept(), {}

    def inputs(
        self, layer: int, weights: Mapping[str, Floats], group: str, *, advance: bool = False
    ) -> Iterator[Floats]:
        """The inputs [T, in] of a group of the layer, step by step. Results of the part before it
        are kept, as by `run_layer` with `last_group`. With `advance` the rest of the layer runs
        too, and the hidden states become those behind it.
        """
        seen: list[Floats] = []

        def observe(found: str, x: Floats) -> None:
            if found == group:
                seen.append(x)

        tap = _Tap(self.params, weights, observe, None if advance else group)
        for start, x in self._steps(tap, layer, weights, keeps=not advance):
            if advance and x is not None:
                self._advance(layer, start, x)
            yield seen.pop()
        if advance:
            self._kept, self._kept_for = _Kept(), {}

    def _advance(self, layer: int, start: int, x: Floats) -> None:
        """The hidden states of the step that begins with window `start` become x, the output of a
        layer.
        """
        check_activation(f"the output of layer {layer}", bool(np.isfinite(x).all()))
        hidden = self._hidden[start : start + self._step]
        hidden[:] = x.reshape(hidden.shape)

    def _steps(
        self, tap: "_Tap", layer: int, weights: Mapping[str, Floats], *, keeps: bool
    ) -> Iterator[tuple[int, Floats | None]]:
        """Run all windows through a layer. Yields for each step its first window, and the hidden
        states behind the layer, or None if the step ended before.
        """
        # a changed norm or bias changes what no weight of a product tells
        others = {name: w for name, w in weights.items() if self.params[name].group is None}
        if not all(_same(self._kept_for.get(name), w) for name, w in others.items()):
            self._kept, self._kept_for = _Kept(), others
        store = self._new_store(layer)
        for start in range(0, len(self._windows), self._step):
            tap.begin(self._kept, start, keeps=keeps)
            try:
                yield start, self._step_layer(tap, layer, weights, start, store)
            except _Reached:
                yield start, None

    def _new_store(self, layer: int) -> Any:
        """A KV cache for the tokens of a step."""
        blocks = self._step * -(-self._windows.shape[1] // BLOCK_SIZE)
        return self._backend.new_kv_store(blocks, BLOCK_SIZE, self._specs[layer])

    @np.errstate(over="ignore", invalid="ignore")  # the callers refuse what is not finite
    def _step_layer(
        self, tap: "_Tap", layer: int, weights: Mapping[str, Floats], start: int, store: Any
    ) -> Floats:
        """The hidden states [T, C] behind a layer, of the step that begins with window `start`."""
        hidden = self._hidden[start : start + self._step]
        x: Floats = self._graph.layers(
            tap.ops,
            self.config,
            weights,
            self._batch(start),
            range(layer, layer + 1),
            [KVLayer(store)],
            hidden.reshape(-1, hidden.shape[-1]),
        )
        return x

    @np.errstate(over="ignore", invalid="ignore")  # observers refuse what is not finite
    def run_head(self, observe: Observe) -> None:
        """Hand the input of the lm_head to `observe`. The logits are not computed."""
        weights = self._load(self._others)
        group = next(p.group for n in self._others if (p := self.params[n]).group is not None)
        tap = _Tap(self.params, weights, observe, group)
        for start in range(0, len(self._windows), self._step):
            hidden = self._hidden[start : start + self._step]
            try:
                self._graph.head(
                    tap.ops,
                    self.config,
                    weights,
                    self._batch(start),
                    hidden.reshape(-1, hidden.shape[-1]),
                )
            except _Reached:
                continue

    def _batch(self, start: int) -> ForwardBatch:
        """The windows of the step that begins with window `start`, each a request from position
        0.
        """
        tokens = self._windows[start : start + self._step]
        count, length = tokens.shape
        columns = -(-length // BLOCK_SIZE)
        tables = np.arange(count * columns, dtype=np.int32).reshape(1, count, columns)
        positions = np.arange(length, dtype=np.int32)
        slots = tables[0][:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        return ForwardBatch(
            input_ids=np.ascontiguousarray(tokens.ravel(), np.int32),
            positions=np.tile(positions, count),
            logits_indices=np.arange(tokens.size, dtype=np.int32),
            hidden_indices=np.zeros(0, np.int32),
            attention=AttentionMetadata(
                cu_seqlens_q=np.arange(count + 1, dtype=np.int32) * np.int32(length),
                seq_lens=np.full(count, length, np.int32),
                block_tables=tables,
                slot_mapping=slots.reshape(1, -1).astype(np.int32),
                block_size=BLOCK_SIZE,
            ),
        )


@np.errstate(over="ignore", invalid="ignore")
def mean_hessian(
    walk: Walk, layer: int, weights: Mapping[str, Floats], group: str
) -> NDArray[np.float64]:
    """The mean of x·xᵀ over the tokens of a walk, x the input of a group of the layer. [n, n]

    Raises FormatError if an activation is NaN or infinite.
    """
    total = np.zeros(())
    for x in walk.inputs(layer, weights, group):
        total = total + x.T @ x
    check_activation(f"the input of {group}", bool(np.isfinite(np.diag(total)).all()))
    return total / walk.num_tokens


class _Reached(Exception):
    """The last group that is wanted was observed."""


def _same(old: Floats | None, new: Floats | None) -> bool:
    return old is new or (old is not None and new is not None and np.array_equal(old, new))


class _Kept:
    """Results of the slow ops of a layer, in the order of the calls of each step, with the weights
    that they belong to.
    """

    def __init__(self) -> None:
        self._steps: dict[int, list[tuple[Floats | None, Floats]]] = {}
        self._free = KEPT_BYTES

    def get(self, step: int, call: int, weight: Floats | None) -> Floats | None:
        """The result of a call. If its weight has changed, it and those behind it are dropped."""
        results = self._steps.get(step, [])
        if call >= len(results):
            return None
        old, result = results[call]
        if _same(old, weight):
            return result
        self._free += sum(dropped.nbytes for _, dropped in results[call:])
        del results[call:]
        return None

    def put(self, step: int, call: int, weight: Floats | None, result: Floats) -> None:
        results = self._steps.setdefault(step, [])
        if call == len(results) and result.nbytes <= self._free:
            results.append((weight, result))
            self._free -= result.nbytes


class _Tap:
    """The reference's ops, with an ear at the inputs of linear layers. Products and attention that
    an earlier run has kept are not computed again.
    """

    def __init__(
        self,
        params: Mapping[str, Param],
        weights: Mapping[str, Floats],
        observe: Observe | None,
        last_group: str | None,
    ) -> None:
        self._groups = {id(weights[name]): params[name].group for name in weights}
        self._observe = observe
        self._last_group = last_group
        self._seen: dict[str, Floats] = {}  # the last input of each group
        self.begin(_Kept(), 0, keeps=False)

    @property
    def ops(self) -> Any:
        """The ops. They refer to this object, so it must not hold them: in a cycle, what an
        observer has collected (Hessians) would live until Python looks for cycles.
        """
        every = {name: vars(reference)[name] for name in reference.__all__}
        own = {"linear": self._linear, "attention": self._attention}
        return SimpleNamespace(**every | own)

    def begin(self, kept: _Kept, step: int, *, keeps: bool) -> None:
        """Begin a step. `keeps`: its results are put into `kept`."""
        self._kept, self._step, self._keeps = kept, step, keeps
        self._calls = 0

    def _linear(self, x: Floats, weight: Floats, bias: Floats | None = None) -> Floats:
        group = self._groups[id(weight)]
        if self._observe is not None and group is not None and self._seen.get(group) is not x:
            self._seen[group] = x
            self._observe(group, x)
            if group == self._last_group:
                raise _Reached
        return self._once(weight, lambda: reference.linear(x, weight, bias))

    def _attention(self, *arguments: Any, **options: Any) -> Floats:
        return self._once(None, lambda: reference.attention(*arguments, **options))

    def _once(self, weight: Floats | None, compute: Callable[[], Floats]) -> Floats:
        """The result of the next slow call of this step."""
        call = self._calls
        self._calls += 1
        result = self._kept.get(self._step, call, weight)
        if result is None:
            result = compute()
            if self._keeps:
                self._kept.put(self._step, call, weight, result)
        return result
