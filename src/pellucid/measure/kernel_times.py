"""How long each op of a model takes on this machine, measured with a few layers: three of each kind
that the real model has, with weights of zeros.

Between two tries as many other bytes are read as a step of the real model reads. So the layers find
weights and the KV cache where the real ones do, in memory or in a cache, and their times hold what
a formula does not know: how far reading overlaps with arithmetic, how fast a kernel unpacks
weights, and what barriers take. Zeros take as long as other numbers: no kernel looks at values.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from .. import _native
from ..backends.native.backend import NativeBackend
from ..backends.native.capture import spec_of
from ..backends.native.costs import StepShape
from ..batch import AttentionMetadata, ForwardBatch
from ..config import ModelConfig
from ..formats import host_tensor, row_bytes
from ..formats.tensor import HostTensor, TensorSpec
from ..models.params import split_name
from ..models.registry import get_graph
from ..ops.protocol import KVLayer, Tensor
from .roofline import BLOCK_SIZE, Item, ModelProgram, build_model_program

__all__ = ["FewLayers", "KernelTimes", "load_few_layers", "measure_kernel_times"]

MAX_BYTES = 1 << 30  # of the few layers and their caches: above, nothing is measured
MAX_VOCAB = 65_536  # rows of the embedding that are run; the time of the head grows with its bytes
COPIES = 3  # layers of each kind: the first finds the code of its kernels in no cache
LEAST_TRIES, MOST_TRIES = 3, 15
SECONDS = 0.3  # for which steps are tried again
MOST_SWEPT = 256 << 20  # more leaves no cache as it was either

# Entries are alike if these agree: label, group, format and shape of the weight, outside the head.
_Key: TypeAlias = tuple[str, str, TensorSpec | None]


@dataclass(frozen=True, slots=True)
class FewLayers:
    """A model of three layers of each kind, with a vocabulary of MAX_VOCAB tokens at most."""

    whole: ModelProgram  # of the real model
    program: ModelProgram  # of these layers
    weights: dict[str, Tensor]
    sweep: Callable[[], None]  # leave the caches as a step of the real model does


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Seconds of each item of a model's program in a step of one shape, in order."""

    seconds: list[float]


def load_few_layers(program: ModelProgram, backend: NativeBackend) -> FewLayers | None:
    """Three layers of each kind, with weights of zeros. None where they are too large to be run
    for a prediction.
    """
    config, specs = _few_of_each_kind(program)
    first = program.layout.specs[0]
    small = build_model_program(config, specs, backend, (first.k_dtype, first.v_dtype))
    if small.weight_bytes > MAX_BYTES:
        return None
    weights = {name: backend.load_weight(_zeros(spec), name) for name, spec in specs.items()}
    pool = _native.ThreadPool(backend.threads)
    swept = min(program.weight_bytes, MOST_SWEPT)
    buffer = _native.ReadBuffer(pool, swept)

    def sweep() -> None:
        buffer.read(backend.isa, pool, swept, 1e-6)

    return FewLayers(program, small, weights, sweep)


def measure_kernel_times(
    few: FewLayers, backend: NativeBackend, step: StepShape
) -> KernelTimes | None:
    """Run a step of this shape through the few layers of the model. None where its cache and its
    activations are too large to be run for a prediction.
    """
    small = few.program
    config, weights = small.config, few.weights
    blocks = [small.layout.columns_for(length) for length in step.seq_lens]
    cache = sum(blocks) * BLOCK_SIZE * small.layout.bytes_per_token
    activations = small.plan.bytes_per_token * step.num_tokens
    if small.weight_bytes + cache + activations > MAX_BYTES:
        return None
    # Lay each request's blocks one after another.
    layers = [
        KVLayer(backend.new_kv_store(sum(blocks), BLOCK_SIZE, spec)) for spec in small.layout.specs
    ]
    graph = get_graph(config.graph)
    forward = backend.build_forward(
        lambda ops, batch: graph.forward_with_hidden(ops, config, weights, batch, layers)
    )
    batch = _batch(step, blocks)
    forward(batch)  # memory that is touched for the first time
    forward.ledger = []
    start = time.monotonic()
    while len(forward.ledger) < LEAST_TRIES or (
        len(forward.ledger) < MOST_TRIES and time.monotonic() - start < SECONDS
    ):
        few.sweep()
        forward(batch)
    # Items that are alike get the median of all their times.
    tries = np.array([timed.seconds for timed in forward.ledger])  # [tries, items]
    places: dict[_Key, list[int]] = {}
    for i, item in enumerate(small.items):
        places.setdefault(_key(item), []).append(i)
    medians = {key: float(np.median(tries[:, found])) for key, found in places.items()}
    costs = small.costs(step)
    scaled = []
    for item, cost in zip(few.whole.items, few.whole.costs(step), strict=True):
        seconds = medians[_key(item)]
        if item.group == "head":  # the vocabulary was cut
            seconds *= max(1.0, cost.bytes / max(1, costs[places[_key(item)][0]].bytes))
        scaled.append(seconds)
    return KernelTimes(scaled)


def _few_of_each_kind(program: ModelProgram) -> tuple[ModelConfig, dict[str, TensorSpec]]:
    """The config and parameters of the few layers. Layers of one window and the same formats are
    of one kind.
    """
    config = program.config
    by_layer: dict[int, dict[str, TensorSpec]] = {}
    others: dict[str, TensorSpec] = {}
    vocab = min(config.vocab_size, MAX_VOCAB)
    for name, spec in program.specs.items():
        layer, module, kind = split_name(name)
        if layer is not None:
            by_layer.setdefault(layer, {})[f"{module}.{kind}"] = spec
        elif spec.shape[0] == config.vocab_size and len(spec.shape) == 2:
            others[name] = replace(spec, shape=(vocab, spec.shape[1]))
        else:
            others[name] = replace(spec)
    kinds = {
        (config.windows[layer], tuple(found.items())): layer for layer, found in by_layer.items()
    }
    layers = [layer for layer in kinds.values() for _ in range(COPIES)]
    specs = others
    for i, layer in enumerate(layers):
        # copies: an entry is named by the identity of its declaration
        specs |= {f"layers.{i}.{name}": replace(s) for name, s in by_layer[layer].items()}
    few = replace(
        config,
        num_layers=len(layers),
        vocab_size=vocab,
        windows=tuple(config.windows[layer] for layer in layers),
    )
    declared = [param.name for param in get_graph(few.graph).parameters(few)]
    return few, {name: specs[name] for name in declared}


def _key(item: Item) -> _Key:
    spec = None if item.entry.weight is None else spec_of(item.entry.weight)
    if spec is not None and item.group in ("head", "embedding"):
        spec = TensorSpec(spec.format, (0, spec.shape[1]))
    return item.label, item.group, spec


def _zeros(spec: TensorSpec) -> HostTensor:
    rows = spec.shape[0] if len(spec.shape) == 2 else 1
    data = np.zeros((rows, row_bytes(spec.format, spec.shape[-1])), np.uint8)
    return host_tensor(spec.format, spec.shape, data)


def _batch(step: StepShape, blocks: list[int]) -> ForwardBatch:
    """Tokens 0 at the last positions of each request."""
    ends = np.cumsum(step.q_lens)
    first_block = np.cumsum([0, *blocks[:-1]])
    # [R, M], padded with blocks that the kernels never reach
    tables = first_block[:, None] + np.minimum(
        np.arange(max(blocks)), np.array(blocks)[:, None] - 1
    )
    positions = np.concatenate(
        [np.arange(s - q, s) for q, s in zip(step.q_lens, step.seq_lens, strict=True)]
    )
    owner = np.repeat(np.arange(len(blocks)), step.q_lens)
    slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    return ForwardBatch(
        input_ids=np.zeros(step.num_tokens, np.int32),
        positions=positions.astype(np.int32),
        logits_indices=(ends[-step.num_logits :] - 1).astype(np.int32),
        hidden_indices=np.zeros(0, np.int32),
        attention=AttentionMetadata(
            cu_seqlens_q=np.array([0, *ends], np.int32),
            seq_lens=np.array(step.seq_lens, np.int32),
            block_tables=tables.astype(np.int32)[None],
            slot_mapping=slots.astype(np.int32)[None],
            block_size=BLOCK_SIZE,
        ),
    )
