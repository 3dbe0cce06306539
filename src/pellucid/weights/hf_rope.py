"""The rotary fields of Hugging Face's `config.json` -> `RopeConfig`.

One idea: the set of fields is small and closed, so all are read and an unknown one is refused. Both
spellings are: `rope_theta` beside `rope_scaling`, and transformers 5's `rope_parameters`, which
holds both, by layer type in Gemma 3.

`dynamic` (NTK) in transformers raises the base as a sequence outgrows `max_position_embeddings`, to
theta · (factor · length / max - (factor - 1))^(d/(d-2)), while keys cached before stay turned by
the older base; within the context it leaves the base alone. Here frequencies are fixed, so that
formula is evaluated once, for the longest context that is served, `max_position_embeddings`, over
the one trained on, `original_max_position_embeddings`. Where a file gives only the former, the two
are one: frequencies are left alone, as in transformers for every sequence that fits, and longer
ones are not served. `longrope` and others are refused.
"""

from ..config import RopeConfig
from ..errors import UnsupportedError
from .fields import Fields

__all__ = ["build_local_rope", "build_rope"]

_LAYER_TYPES = ("full_attention", "sliding_attention")


def build_rope(
    fields: Fields, head_dim: int, *, layer_type: str | None = None, theta: float = 10_000.0
) -> RopeConfig:
    """The rotary embedding of a model, or of its layers of `layer_type`. `theta` is the family's
    default.
    """
    theta = fields.number("rope_theta", theta)
    rope = _scaling(fields, layer_type)
    for scope in (fields, rope or fields):
        if scope.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(
                f"{scope.where}: partial_rotary_factor is "
                f"{scope.number('partial_rotary_factor')}; only 1 is supported"
            )
    if rope is None:
        return RopeConfig(theta=theta, rotary_dim=head_dim)
    theta = rope.number("rope_theta", theta)
    kind = rope.text("rope_type", rope.text("type", "default"))
    length = fields.integer("max_position_embeddings")
    original = fields.integer(
        "original_max_position_embeddings", rope.integer("original_max_position_embeddings", length)
    )
    if original < 1:
        raise rope.error("original_max_position_embeddings", f"{original}; it must be at least 1")
    config = _build(rope, kind, theta, head_dim, length, original)
    unknown = [
        name
        for name in rope.unread()
        if name not in ("rope_type", "type", "factor") and rope.value(name) is not None
    ]
    if unknown:
        raise UnsupportedError(
            f"{rope.where}: {unknown[0]} is set, which is not known for rope_type {kind!r}"
        )
    return config


def build_local_rope(fields: Fields, head_dim: int) -> RopeConfig:
    """Gemma 3's windowed layers: a base of their own, never scaled."""
    theta = fields.number("rope_local_base_freq", 10_000.0)
    new = fields.section("rope_parameters")
    local = new.section("sliding_attention") if new is not None else None
    if local is not None:
        kind = local.text("rope_type", local.text("type", "default"))
        if kind != "default":
            raise UnsupportedError(
                f"{local.where}: rope_type is {kind!r}; only 'default' is supported for windowed "
                "layers"
            )
        theta = local.number("rope_theta", theta)
    return RopeConfig(theta=theta, rotary_dim=head_dim)


def _scaling(fields: Fields, layer_type: str | None) -> Fields | None:
    """The object that says how frequencies are scaled. Where both spellings are there, transformers
    takes the older one, and so do we.
    """
    old, new = fields.section("rope_scaling"), fields.section("rope_parameters")
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


def _build(
    rope: Fields, kind: str, theta: float, head_dim: int, length: int, original: int
) -> RopeConfig:
    if kind == "default":
        return RopeConfig(theta=theta, rotary_dim=head_dim)
    if kind == "linear":
        return RopeConfig(
            theta=theta, rotary_dim=head_dim, scaling="linear", factor=rope.number("factor")
        )
    if kind == "dynamic":
        stretch = rope.number("factor") * (length / original - 1.0) + 1.0
        return RopeConfig(
            theta=theta,
            rotary_dim=head_dim,
            scaling="ntk" if stretch > 1.0 else "none",
            factor=max(stretch, 1.0),
        )
    if kind == "yarn":
        if not rope.flag("truncate", True):
            raise UnsupportedError(f"{rope.where}: truncate is false, which is not supported")
        return RopeConfig(
            theta=theta,
            rotary_dim=head_dim,
            scaling="yarn",
            factor=rope.number("factor", length / original),
            original_max_position_embeddings=original,
            beta_fast=rope.number("beta_fast", 32.0),
            beta_slow=rope.number("beta_slow", 1.0),
            attention_factor=rope.optional_number("attention_factor"),
        )
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            rotary_dim=head_dim,
            scaling="llama3",
            factor=rope.number("factor"),
            original_max_position_embeddings=original,
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
        )
    raise UnsupportedError(
        f"{rope.where}: rope_type is {kind!r}; known ones are: default, linear, dynamic, yarn, "
        "llama3"
    )
