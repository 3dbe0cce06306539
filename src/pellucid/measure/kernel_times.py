"""The time of each op of a model on this machine if memory is not the bound. A small model is run,
with one layer of each kind of the real model, and with weights of zeros.

In a decode step, unpacking weights takes time even with fast memory, and small ops take the time of
a barrier. The roofline has neither; these times have both. The small model fits in a cache of the
CPU, so the memory's roof is applied afterwards (`plan.py`). Zeros take as long as other numbers,
because no kernel branches on values.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from ..backends.native.backend import NativeBackend
from ..backends.native.capture import spec_of
from ..backends.native.costs import StepShape
from ..batch import AttentionMetadata, ForwardBatch
from ..config import ModelConfig
from ..formats import host_tensor, row_bytes
from ..formats.tensor import HostTensor, TensorSpec
from ..models.params import split_name
from ..models.registry import get_graph
from ..ops.protocol import KVLayer
from .roofline import BLOCK_SIZE, Item, ModelProgram, build_model_program

__all__ = ["KernelTimes", "measure_kernel_times"]

MAX_BYTES = 1 << 30  # of the few layers and their caches: above, nothing is measured
MAX_VOCAB = 16_384  # rows of the embedding that are run; the time of the head grows with its bytes
TRIES = 5  # of which the median counts

# Entries are alike if these agree: label, group, format and shape of the weight, outside the head.
_Key: TypeAlias = tuple[str, str, TensorSpec | None]


@dataclass(frozen=True, slots=True)
class KernelTimes:
    """Seconds of each item of a model's program in a step of one shape, in order."""

    seconds: list[float]


def measure_kernel_times(
    program: ModelProgram, backend: NativeBackend, step: StepShape
) -> KernelTimes | None:
    """Run a step of this shape through one layer of each kind. None if these layers alone are too
    large to be run for a prediction.
    """
    config, specs = _one_of_each_kind(program)
    first = program.layout.specs[0]
    small = build_model_program(config, specs, backend, (first.k_dtype, first.v_dtype))
    blocks = [small.layout.columns_for(length) for length in step.seq_lens]
    cache = sum(blocks) * BLOCK_SIZE * small.layout.bytes_per_token
    activations = small.plan.bytes_per_token * step.num_tokens
    if small.weight_bytes + cache + activations > MAX_BYTES:
        return None
    # Load zeros, and lay each request's blocks one after another.
    weights = {name: backend.load_weight(_zeros(spec), name) for name, spec in specs.items()}
    layers = [
        KVLayer(backend.new_kv_store(sum(blocks), BLOCK_SIZE, spec)) for spec in small.layout.specs
    ]
    graph = get_graph(config.graph)
    forward = backend.build_forward(
        lambda ops, batch: graph.forward(ops, config, weights, batch, layers)
    )
    batch = _batch(step, blocks)
    forward(batch)  # memory that is touched for the first time
    forward.ledger = []
    for _ in range(TRIES):
        forward(batch)
    medians = np.median([timed.seconds for timed in forward.ledger], axis=0)
    # Give each item of the model the mean time of the items like it.
    found: dict[_Key, list[tuple[float, int]]] = {}
    for item, cost, seconds in zip(small.items, small.costs(step), medians.tolist(), strict=True):
        found.setdefault(_key(item), []).append((seconds, cost.bytes))
    scaled = []
    for item, cost in zip(program.items, program.costs(step), strict=True):
        alike = found[_key(item)]
        seconds = sum(s for s, _ in alike) / len(alike)
        if item.group == "head":  # the vocabulary was cut
            seconds *= max(1.0, cost.bytes / max(1, alike[0][1]))
        scaled.append(seconds)
    return KernelTimes(scaled)


def _one_of_each_kind(program: ModelProgram) -> tuple[ModelConfig, dict[str, TensorSpec]]:
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
    specs = others
    for i, layer in enumerate(kinds.values()):
        # copies: an entry is named by the identity of its declaration
        specs |= {f"layers.{i}.{name}": replace(s) for name, s in by_layer[layer].items()}
    few = replace(
        config,
        num_layers=len(kinds),
        vocab_size=vocab,
        windows=tuple(config.windows[layer] for layer in kinds.values()),
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
        attention=AttentionMetadata(
            cu_seqlens_q=np.array([0, *ends], np.int32),
            seq_lens=np.array(step.seq_lens, np.int32),
            block_tables=tables.astype(np.int32)[None],
            slot_mapping=slots.astype(np.int32)[None],
            block_size=BLOCK_SIZE,
        ),
    )
