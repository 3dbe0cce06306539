"""A model's step as a list of ops with costs: the purpose of each entry of its program, and its
FLOPs and bytes for given lengths. `plan` and `profile` add them up and compare them with the roofs
of a device.

No weight is read. The forward pass is captured from declarations (`backends/native/capture.py`),
and the cost of an entry follows from its shapes (`backends/native/costs.py`). Two ratios compare a
step with its roofs (Chowdhery et al., arXiv:2204.02311, for the first):

    MFU = FLOPs / (seconds · peak)          MBU = bytes / (seconds · bandwidth)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..backends.native.backend import NativeBackend
from ..backends.native.capture import Entry, Symbol, capture
from ..backends.native.costs import StepShape, entry_cost
from ..backends.native.plan import Plan, build_plan
from ..config import ModelConfig
from ..formats.tensor import TensorSpec
from ..kv.layout import KVLayout, build_layout
from ..kv_spec import build_kv_specs
from ..models.params import split_name
from ..models.registry import get_graph
from ..ops.backend import Forward
from ..ops.cost import OpCost
from ..ops.protocol import KVLayer

__all__ = ["BLOCK_SIZE", "Item", "ModelProgram", "build_model_program", "total"]

BLOCK_SIZE = 16  # tokens of a KV block: EngineConfig's default


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of the program, and its purpose."""

    entry: Entry
    barrier: bool  # threads wait for each other before it
    names: tuple[str, ...]  # of its parameters
    label: str  # figures are added up by label: "q_proj", "attention", "add"
    group: str  # "embedding", "layers", "layers, window 512", "head"

    @property
    def is_streamed(self) -> bool:
        """Whether it reads from memory: weights or the KV cache. Other inputs were just written and
        lie in a cache of the CPU.
        """
        return self.entry.kv is not None or self.entry.weight is not None


@dataclass(frozen=True)
class ModelProgram:
    """The captured forward pass of a model."""

    config: ModelConfig
    specs: Mapping[str, TensorSpec]
    layout: KVLayout
    items: tuple[Item, ...]
    plan: Plan
    result: Symbol
    weight_bytes: int

    @cached_property
    def num_barriers(self) -> int:
        """How often threads wait for each other in a step, its end included."""
        return sum(item.barrier for item in self.items) + 1

    def costs(self, step: StepShape) -> list[OpCost]:
        """The cost of each item in a step of these lengths."""
        return [entry_cost(item.entry, step) for item in self.items]

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of one request's keys and values; a layer with a window keeps at most its
        window.
        """
        return sum(
            size * (num_tokens if spec.window is None else min(num_tokens, spec.window))
            for spec, size in zip(self.layout.specs, self.layout.token_bytes, strict=True)
        )

    def working_set(self, item: Item, cost: OpCost, step: StepShape) -> int:
        """Bytes that are read between two runs of the item: all weights and the KV cache of a step,
        or only the item's own data. They decide in which level of the memory hierarchy it finds its
        data.
        """
        if item.is_streamed:
            return self.weight_bytes + sum(map(self.kv_bytes, step.seq_lens))
        return cost.bytes

    def forward(self) -> Forward:
        """The forward pass over declarations, for `Backend.step_bytes`."""
        return _forward(self.config, self.specs, self.layout)


def build_model_program(
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    backend: NativeBackend,
    kv_dtypes: tuple[str, str],
) -> ModelProgram:
    """Capture the model's forward pass. Raises UnsupportedError or ConfigError if the native
    backend cannot run it.
    """
    backend.check_model(config)
    kv_specs = build_kv_specs(config, *kv_dtypes)
    layout = build_layout(kv_specs, [backend.kv_token_bytes(s) for s in kv_specs], BLOCK_SIZE)
    captured = capture(_forward(config, specs, layout))
    plan = build_plan(captured)
    return ModelProgram(
        config,
        specs,
        layout,
        tuple(_items(config, specs, captured.entries, plan.barriers)),
        plan,
        captured.result,
        sum(map(backend.weight_bytes, specs.values())),
    )


def total(costs: Sequence[OpCost]) -> OpCost:
    """The sum of the costs."""
    return sum(costs, OpCost(0, 0, 0))


def _forward(config: ModelConfig, specs: Mapping[str, TensorSpec], layout: KVLayout) -> Forward:
    graph = get_graph(config.graph)
    group_of = {layer: g for g, group in enumerate(layout.groups) for layer in group.layers}
    # a KVSpec in place of each store, because nothing is written
    caches = [KVLayer(replace(spec), group_of[i]) for i, spec in enumerate(layout.specs)]
    return lambda ops, batch: graph.forward_with_hidden(ops, config, specs, batch, caches)


def _items(
    config: ModelConfig,
    specs: Mapping[str, TensorSpec],
    entries: Sequence[Entry],
    barriers: Sequence[bool],
) -> list[Item]:
    """Name the entries. One without parameters belongs to the layer of the entry before it."""
    name_of = {id(spec): name for name, spec in specs.items()}
    group, items = "embedding", []
    for entry, barrier in zip(entries, barriers, strict=True):
        parts = ([] if entry.weight is None else [entry.weight]) + entry.vectors
        names = tuple(name_of[id(part)] for part in parts if id(part) in name_of)
        label = entry.op
        if names:
            layer, module, _ = split_name(names[0])
            if layer is not None:
                window = config.windows[layer]
                group = "layers" if window is None else f"layers, window {window}"
            elif entry.op != "embed":
                group = "head"
            if entry.op == "linear":
                label = "lm_head" if layer is None else module
        if entry.op == "take_rows":
            group = "head"
        items.append(Item(entry, barrier, names, label, group))
    return items
