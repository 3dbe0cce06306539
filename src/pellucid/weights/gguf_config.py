"""GGUF metadata -> `ModelConfig`. Keys are "<architecture>.<name>". Each family reads its own keys
(`families/`), as llama.cpp's loader does.

A key that may change the forward pass and that the family did not read is refused. Keys that cannot
change it (names, datasets, facts about training) are ignored.
"""

from collections.abc import Mapping, Sequence

from ..config import ModelConfig
from ..errors import UnsupportedError
from .families import GGUFHeader, GGUFReader, find_gguf_reader
from .fields import Fields, config_from_file

__all__ = ["build_gguf_config", "gguf_reader"]

_HARMLESS = ("rope.scaling.finetuned",)  # says how the model was trained
# keys that may change the forward pass begin with one of these
_TELLING = ("attention.", "rope.", "expert_")
# or end with one of these: logit_scale, embedding_scale, use_parallel_residual
_TELLING_ENDS = ("_scale", "_residual", "_softcapping")


def gguf_reader(metadata: Mapping[str, object], where: str) -> GGUFReader:
    """The reader of the family that a GGUF file names. `where` names the file in messages."""
    general = Fields(where, metadata, "general.")
    architecture = general.text("architecture")
    kind = general.text("type", "model")
    if kind != "model":
        raise UnsupportedError(f"{where} is a GGUF file of type {kind!r}; only 'model' can be run")
    return find_gguf_reader(architecture, where)


def build_gguf_config(
    metadata: Mapping[str, object],
    shapes: Mapping[str, tuple[int, ...]],
    rope_factors: Mapping[str, Sequence[float]],
    where: str,
) -> ModelConfig:
    """The config of a GGUF file, from its metadata, the shapes of its tensors, and its tensors of
    rotary factors, both by name.
    """
    reader = gguf_reader(metadata, where)
    fields = Fields(where, metadata, f"{reader.architecture}.")
    if fields.integer("expert_count", 0):
        raise UnsupportedError(
            f"{where}: {reader.architecture} with expert_count {fields.integer('expert_count')} is "
            "a mixture of experts; only dense models run"
        )
    with config_from_file(where):
        config = reader.config(GGUFHeader(fields, shapes, rope_factors))
    _check_unread(fields)
    return config


def _check_unread(fields: Fields) -> None:
    """Refuse a key that may change the forward pass and was not read, unless its value turns it
    off.
    """
    for name in fields.unread():
        if name in _HARMLESS or not (name.startswith(_TELLING) or name.endswith(_TELLING_ENDS)):
            continue
        value = fields.value(name)
        if any(value) if isinstance(value, Sequence) and not isinstance(value, str) else value:
            raise UnsupportedError(
                f"{fields.where}: {name} is set, which may change what the model computes and is "
                "not supported"
            )
