"""The rotary fields of Hugging Face's `config.json` -> `RopeConfig`, as transformers 5 reads them.

The fields are few and known, so all are read and an unknown one is refused. There are two forms:
`rope_theta` beside `rope_scaling`, and transformers 5's `rope_parameters`, which holds both (per
layer type in Gemma 3).

In transformers the frequencies of two methods depend on the length of a sequence. Here they are
fixed:

    dynamic   raises the base when a sequence is longer than `max_position_embeddings`. Such
              sequences are not served; shorter ones have the plain frequencies.
    longrope  has factors for sequences up to `original_max_position_embeddings` tokens and others
              for longer ones. The first are used, and longer sequences are not served.
"""

import logging
import math
from collections.abc import Sequence

from ..config import RopeConfig
from ..errors import UnsupportedError
from .fields import Fields

__all__ = ["build_local_rope", "build_rope", "served_context", "warn_of_short_context"]

_log = logging.getLogger(__name__)

_LAYER_TYPES = ("full_attention", "sliding_attention")
KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
MAX_FACTORS = 1 << 15


def build_rope(
    fields: Fields,
    head_dim: int,
    *,
    layer_type: str | None = None,
    theta: float = 10_000.0,
    kinds: Sequence[str] = KINDS,
    partial: bool = False,
    original: int | None = None,
) -> RopeConfig:
    """The rotary embedding of a model, or of its layers of one `layer_type`.

    `theta` and `original` are the family's defaults for the base and for the training context.
    `kinds` are the methods that transformers has for the family. `partial`: its models may rotate
    only a part of each head.
    """
    # the fields beside the scaling object, and the fields in it
    theta = fields.number("rope_theta", theta)
    rope = _scaling(fields, layer_type)
    share = _rotary_share(fields, rope, partial)
    rotary_dim = head_dim if share == 1.0 else int(head_dim * share)
    if rope is None:
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    # the method
    kind = _rope_type(rope)
    if layer_type is not None:
        kinds = [k for k in kinds if k != "longrope"]  # its context is the whole model's
    if kind not in kinds:
        raise UnsupportedError(
            f"{rope.where}: rope_type is {kind!r}; known ones are: {', '.join(kinds)}"
        )
    theta = rope.number("rope_theta", theta)
    length = trained = fields.integer("max_position_embeddings")
    if kind in ("yarn", "longrope", "llama3"):
        trained = _original(fields, rope, length, original)
    by_layer_type = layer_type is not None
    config = _build(rope, kind, theta, rotary_dim, length, trained, by_layer_type)
    # refuse fields that were not read
    unknown = [
        name
        for name in rope.unread()
        if name not in ("rope_type", "type", "factor", "original_max_position_embeddings")
        and rope.value(name) is not None
    ]
    if unknown:
        raise UnsupportedError(
            f"{rope.where}: {unknown[0]} is set, which is not known for rope_type {kind!r}"
        )
    return config


def build_local_rope(fields: Fields, head_dim: int) -> RopeConfig:
    """The rotary embedding of Gemma 3's windowed layers: a base of their own, never scaled."""
    theta = fields.number("rope_local_base_freq", 10_000.0)
    new = fields.section("rope_parameters")
    local = new.section("sliding_attention") if new is not None else None
    if local is not None:
        kind = _rope_type(local)
        if kind != "default":
            raise UnsupportedError(
                f"{local.where}: rope_type is {kind!r}; only 'default' is supported for windowed "
                "layers"
            )
        theta = local.number("rope_theta", theta)
    return RopeConfig(theta=theta, rotary_dim=head_dim)


def served_context(fields: Fields, original: int | None = None) -> int:
    """The longest sequence that is served: `max_position_embeddings`, except for longrope (see
    above). `original` is the family's default for the training context.
    """
    length = fields.integer("max_position_embeddings")
    rope = _scaling(fields, None)
    if rope is None or _rope_type(rope) != "longrope":
        return length
    return warn_of_short_context(fields.where, length, _original(fields, rope, length, original))


def warn_of_short_context(where: str, length: int, original: int) -> int:
    """The context that a longrope model is served with; logs a sentence if the model's own is
    longer.
    """
    if original < length:
        _log.warning(
            "%s: sequences of up to %d of %d tokens are served: longrope's factors for longer ones "
            "change all positions, which keys in the cache cannot follow",
            where,
            original,
            length,
        )
    return min(length, original)


def _rope_type(rope: Fields) -> str:
    return rope.text("rope_type", rope.text("type", "default"))


def _scaling(fields: Fields, layer_type: str | None) -> Fields | None:
    """The scaling object. If a file has both forms, the older one counts, as in transformers."""
    old, new = fields.section("rope_scaling"), fields.section("rope_parameters")
    if old is not None and not old.unread():
        old = None  # an empty object counts as absent
    if layer_type is not None and old is not None:
        if new is not None or not old.has("rope_type"):
            raise UnsupportedError(
                f"{fields.where}: rope_scaling of this family must name its rope_type, and "
                "rope_parameters must not stand beside it"
            )
        return old
    if old is not None or new is None or layer_type is None:
        return old if old is not None else new
    section = new.section(layer_type)
    flat = [name for name in new.unread() if name not in _LAYER_TYPES]
    if flat:
        raise UnsupportedError(
            f"{new.where}: {flat[0]} is set for all layers; this family sets it by layer type: "
            f"{', '.join(_LAYER_TYPES)}"
        )
    return section


def _rotary_share(fields: Fields, rope: Fields | None, partial: bool) -> float:
    """`partial_rotary_factor`: the share of each head's dimensions that is rotated."""
    outer = fields.number("partial_rotary_factor", 1.0)
    share = outer if rope is None else rope.number("partial_rotary_factor", outer)
    if not partial and share != 1.0:
        raise UnsupportedError(
            f"{fields.where}: partial_rotary_factor is {share}; only 1 is supported for this family"
        )
    if not 0 < share <= 1:
        raise fields.error("partial_rotary_factor", f"{share}; it must be above 0 and at most 1")
    return share


def _original(fields: Fields, rope: Fields, length: int, default: int | None) -> int:
    """The training context. The field beside `rope_scaling` wins over the one within it, which a
    family with its own default does not read.
    """
    name = "original_max_position_embeddings"
    within = rope.integer(name, length) if default is None else default
    original = fields.integer(name, within)
    if original < 1:
        raise rope.error(name, f"{original}; it must be at least 1")
    return original


def _build(
    rope: Fields,
    kind: str,
    theta: float,
    rotary_dim: int,
    length: int,
    original: int,
    by_layer_type: bool,
) -> RopeConfig:
    """The config of one method. `length` is the longest context, `original` the training
    context.
    """
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "linear":
        return RopeConfig(
            theta=theta, rotary_dim=rotary_dim, scaling="linear", factor=rope.number("factor")
        )
    if kind == "dynamic":
        rope.number("factor")
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "longrope":
        return _longrope(rope, theta, rotary_dim, length, original)
    if kind == "yarn":
        factor = rope.number("factor", length / original if rope.has("factor") else None)
        return RopeConfig(
            theta=theta,
            rotary_dim=rotary_dim,
            scaling="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            beta_fast=rope.number("beta_fast", 32.0) or 32.0,
            beta_slow=rope.number("beta_slow", 1.0) or 1.0,
            # transformers treats null as false, and does not read it per layer type
            truncate=by_layer_type or rope.flag("truncate", not rope.has("truncate")),
            attention_factor=_yarn_attention_factor(rope, factor),
        )
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling="llama3",
        factor=rope.number("factor"),
        original_max_position_embeddings=original,
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float | None:
    """The scale of cos and sin; None for YaRN's default. DeepSeek's `mscale` and `mscale_all_dim`
    count if both are given.
    """
    given = rope.optional_number("attention_factor")
    mscale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    if given is not None or not (mscale and all_dim):
        return given
    slope = 0.1 * math.log(max(factor, 1.0))
    return (slope * mscale + 1.0) / (slope * all_dim + 1.0)


def _longrope(
    rope: Fields, theta: float, rotary_dim: int, length: int, original: int
) -> RopeConfig:
    short, long = (
        rope.numbers("short_factor", MAX_FACTORS),
        rope.numbers("long_factor", MAX_FACTORS),
    )
    if len(short) != len(long):
        raise rope.error("long_factor", f"{len(long)} numbers; short_factor has {len(short)}")
    factor, scale = (
        rope.number("factor", length / original),
        rope.optional_number("attention_factor"),
    )
    if scale is None:
        scale = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling="factors",
        freq_factors=tuple(short),
        attention_factor=scale,
    )
