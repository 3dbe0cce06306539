"""Architectures by name: what each declares and how it runs. The one place that lists the model
families.

A name that is not here is refused with the list of those that are; nothing is tried on the ground
that it looks alike.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from ..batch import ForwardBatch
from ..config import ModelConfig
from ..errors import UnsupportedError
from ..ops.protocol import KVLayer, Ops, Tensor
from . import gemma, gpt2, llama
from .params import Param

__all__ = ["ARCHITECTURES", "Architecture", "get_architecture"]


@dataclass(frozen=True, slots=True)
class Architecture:
    """A family: `parameters(config)` declares its tensors, `forward(ops, config, weights, batch,
    kv_layers)` gives logits [L, V].
    """

    parameters: Callable[[ModelConfig], Iterator[Param]]
    forward: Callable[
        [Ops, ModelConfig, Mapping[str, Tensor], ForwardBatch, Sequence[KVLayer]], Tensor
    ]


_GPT2 = Architecture(gpt2.parameters, gpt2.forward)
_LLAMA = Architecture(llama.parameters, llama.forward)
_GEMMA = Architecture(gemma.parameters, gemma.forward)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gpt2": _GPT2,
        "llama": _LLAMA,
        "mistral": _LLAMA,
        "qwen2": _LLAMA,
        "qwen3": _LLAMA,
        "gemma2": _GEMMA,
        "gemma3": _GEMMA,
    }
)


def get_architecture(name: str) -> Architecture:
    """The family called `name`, a `ModelConfig.architecture`."""
    if name not in ARCHITECTURES:
        raise UnsupportedError(
            f"architecture is {name!r}; known ones are: {', '.join(sorted(ARCHITECTURES))}"
        )
    return ARCHITECTURES[name]
