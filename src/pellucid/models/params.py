"""The single declaration of a parameter. Loading, sharding, the cost model, quantization groups and
the memory plan derive from it.

A model file yields one `Param` for each tensor it reads in its forward pass, under a canonical
name: Hugging Face's words without its prefixes, as in "layers.3.q_proj.weight". The files of
`weights/families/` say where a file holds each of them.
"""

from dataclasses import dataclass
from typing import Literal

__all__ = ["Param", "Shard", "split_name"]

Shard = Literal["column", "row", "vocab", "replicated"]


@dataclass(frozen=True, slots=True)
class Param:
    """One tensor. A linear weight has shape [out, in].

    `shard` is how tensor parallelism cuts it: "column" splits outputs, "row" splits inputs (and its
    product must be all-reduced), "vocab" splits the vocabulary. A bias declared "row" is added to a
    partial sum: the first rank holds it, the others hold zeros. `group` names the activation that
    it multiplies: weights of one group share their input, so they share its Hessian (GPTQ), its
    scales (AWQ, SmoothQuant) and its quantization to int8.
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
