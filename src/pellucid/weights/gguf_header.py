"""The header of a GGUF file for a model: its keys, and the tensors of rotary factors.

The family writes its keys (`families/`). They are then read back as from a file. A property of the
model that GGUF files of this family cannot hold comes back changed, and is refused by its name.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig, RopeConfig
from ..errors import UnsupportedError
from ..models.rope import build_rope_table
from .families import gguf_reader_of
from .families.gguf import ROPE_FREQS, ROPE_SHORT
from .gguf_config import build_gguf_config

__all__ = ["gguf_header"]

ROPE_LONG = "rope_factors_long.weight"
_TOLERANCE = 1e-6  # of frequencies: factors are float32 in files
# the name of the family, and what is compared by its effect
_COMPARED = {"architecture", "rope", "rope_local", "softmax_scale"}


def gguf_header(
    config: ModelConfig, shapes: Mapping[str, tuple[int, ...]], where: str
) -> tuple[dict[str, object], dict[str, NDArray[np.float32]]]:
    """(the keys of the architecture, the tensors of rotary factors by name) of a GGUF file for this
    model. `shapes` are those of the file's other tensors, `where` names the model in messages.

    Raises UnsupportedError for a property that GGUF files of the family cannot hold.
    """
    reader = gguf_reader_of(config.architecture)
    metadata: dict[str, object] = {"general.architecture": reader.architecture}
    metadata |= {f"{reader.architecture}.{k}": v for k, v in reader.values(config).items()}
    factors = {} if config.rope is None else _factors(config.rope)
    listed = {name: [float(f) for f in values] for name, values in factors.items()}
    found = build_gguf_config(metadata, shapes, listed, where)
    for name in _differences(config, found):
        raise UnsupportedError(
            f"{where}: a GGUF file of the architecture {reader.architecture!r} cannot hold its "
            f"{name}"
        )
    return metadata, factors


def _factors(rope: RopeConfig) -> dict[str, NDArray[np.float32]]:
    """The tensors of factors that a rotary embedding needs."""
    if rope.scaling == "factors":
        values = np.array(rope.freq_factors, np.float32)
        # sequences longer than the training context, which the long factors are for, are not served
        return {ROPE_SHORT: values, ROPE_LONG: values}
    if rope.scaling != "llama3":
        return {}
    slowed = build_rope_table(rope).inv_freq
    plain = build_rope_table(RopeConfig(theta=rope.theta, rotary_dim=rope.rotary_dim)).inv_freq
    return {ROPE_FREQS: np.array([a / b for a, b in zip(plain, slowed, strict=True)], np.float32)}


def _differences(wanted: ModelConfig, found: ModelConfig) -> list[str]:
    """What differs between two configs, of all that changes what a model computes."""
    theirs = asdict(found)
    different = [
        f"{name}, {value!r}"
        for name, value in asdict(wanted).items()
        if name not in _COMPARED and value != theirs[name]
    ]
    if not math.isclose(wanted.attention_scale, found.attention_scale, rel_tol=_TOLERANCE):
        different.append(f"scale of scores, {wanted.attention_scale:g}")
    for layer in range(wanted.num_layers):
        if not _turn_alike(wanted.layer_rope(layer), found.layer_rope(layer)):
            different.append(f"rotary embedding of layer {layer}")
            break
    return different


def _turn_alike(wanted: RopeConfig | None, found: RopeConfig | None) -> bool:
    """Whether two rotary embeddings have the same effect."""
    if wanted is None or found is None:
        return wanted is found
    ours, theirs = build_rope_table(wanted), build_rope_table(found)
    return len(ours.inv_freq) == len(theirs.inv_freq) and all(
        math.isclose(a, b, rel_tol=_TOLERANCE)
        for a, b in zip((*ours.inv_freq, ours.scale), (*theirs.inv_freq, theirs.scale), strict=True)
    )
