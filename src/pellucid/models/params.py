"""The declaration of a parameter. Loading, sharding, costs, quantization groups and the memory plan
are derived from it.

A graph yields one `Param` for each tensor that its forward pass reads, under a canonical name:
Hugging Face's name without its prefixes, such as "layers.3.q_proj.weight". `weights/families/` says
where a model file holds each of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["Feeds", "Param", "Shard", "linear_parameters", "split_name"]

Shard = Literal["column", "row", "vocab", "replicated"]


@dataclass(frozen=True, slots=True)
class Feeds:
    """The activation, by the name of its group, whose channels are linear in the rows of a
    parameter: a row times s gives a channel times s. So s can be taken out of the weights that
    multiply the activation, and nothing changes (AWQ, SmoothQuant).

    Row i makes channel i. With `copies` each `unit` of neighbouring rows makes so many units of
    channels in turn: query heads share the values of one head.
    """

    group: str
    unit: int = 1
    copies: int = 1


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor. A linear weight has shape [out, in].

    `shard` is how tensor parallelism splits it: "column" splits outputs, "row" splits inputs (the
    product must then be all-reduced), "vocab" splits the vocabulary. A "row" bias is added to a
    partial sum, so the first rank holds it and the others hold zeros. `group` names the activation
    that the weight multiplies. Weights of one group share that activation's Hessian (GPTQ), scales
    (AWQ, SmoothQuant) and quantization to int8. All parameters that feed an activation (weight and
    bias of a norm) must be scaled together, and nothing but its group may read the activation.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard = "replicated"
    group: str | None = None  # None: not the weight of a linear layer
    quantizable: bool = False
    feeds: Feeds | None = None  # None: its rows cannot be scaled


def linear_parameters(
    name: str, out: int, in_: int, shard: Shard, group: str, bias: bool, feeds: Feeds | None = None
) -> Iterator[Param]:
    """A weight [out, in] and, if the model has one, a bias [out]."""
    yield Param(f"{name}.weight", (out, in_), shard, group=group, quantizable=True, feeds=feeds)
    if bias:
        yield Param(f"{name}.bias", (out,), shard, feeds=feeds)


def split_name(name: str) -> tuple[int | None, str, str]:
    """A canonical name as (layer, module, kind): "layers.3.q_proj.weight" -> (3, "q_proj",
    "weight"), and "norm.weight" -> (None, "norm", "weight").
    """
    *head, module, kind = name.split(".")
    return (int(head[1]) if head else None), module, kind
