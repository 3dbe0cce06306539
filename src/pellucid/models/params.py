"""The declaration of a parameter. Loading, sharding, costs, quantization groups and the memory plan
are derived from it.

A graph yields one `Param` for each tensor that its forward pass reads, under a canonical name:
Hugging Face's name without its prefixes, such as "layers.3.q_proj.weight". `weights/families/` says
where a model file holds each of them.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Param", "Shard", "split_name"]

Shard = Literal["column", "row", "vocab", "replicated"]


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor. A linear weight has shape [out, in].

    `shard` is how tensor parallelism splits it: "column" splits outputs, "row" splits inputs (the
    product must then be all-reduced), "vocab" splits the vocabulary. A "row" bias is added to a
    partial sum, so the first rank holds it and the others hold zeros. `group` names the activation
    that the weight multiplies. Weights of one group share that activation's Hessian (GPTQ), scales
    (AWQ, SmoothQuant) and quantization to int8.
    """

    name: str
    shape: tuple[int, ...]
    shard: Shard = "replicated"
    group: str | None = None  # None: not the weight of a linear layer
    quantizable: bool = False


def split_name(name: str) -> tuple[int | None, str, str]:
    """A canonical name as (layer, module, kind): "layers.3.q_proj.weight" -> (3, "q_proj",
    "weight"), and "norm.weight" -> (None, "norm", "weight").
    """
    *head, module, kind = name.split(".")
    return (int(head[1]) if head else None), module, kind
