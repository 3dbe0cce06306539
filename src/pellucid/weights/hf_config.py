"""Hugging Face `config.json` -> `ModelConfig`. `model_type` decides the family, and each family
reads its own fields (`families/`).

A field means the same as in transformers. A field that transformers' model of that type reads is
read here or refused. Other fields have no effect, as in transformers.
"""

from collections.abc import Mapping

from ..config import ModelConfig
from ..errors import UnsupportedError
from .families import HFReader, find_hf_reader
from .fields import Fields, config_from_file
from .quantization import read_quantization

__all__ = ["build_hf_config", "hf_reader"]


def hf_reader(values: Mapping[str, object], where: str) -> HFReader:
    """The reader of the family that config.json names. Raises UnsupportedError unless it is a
    causal language model whose weights can be read. `where` names the file in messages.
    """
    fields = Fields(where, values)
    model_type = fields.text("model_type")
    # refuse models that are more than a dense text model
    if fields.section("vision_config") is not None or fields.section("text_config") is not None:
        raise UnsupportedError(
            f"{where}: model_type {model_type!r} has text and images; only text models run"
        )
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.optional_integer(name):
            raise UnsupportedError(
                f"{where}: {model_type} with {name} {fields.integer(name)} is a mixture of "
                "experts; only dense models run"
            )
    # the family, and the kind of model that its weights are
    reader = find_hf_reader(model_type, where)
    for architecture in fields.optional_texts("architectures") or ():
        if not architecture.endswith(("ForCausalLM", "LMHeadModel")):
            raise UnsupportedError(
                f"{where}: architectures names {architecture!r}; only causal language models "
                "(…ForCausalLM) run"
            )
    read_quantization(values, where)
    # refuse what transformers reads for every family and no family reads here
    for name in ("per_layer_config", "default_theta"):
        if fields.value(name) is not None:
            raise UnsupportedError(f"{where}: {name} is set, which is not supported")
    for name in ("use_bidirectional_attention", "is_encoder_decoder", "add_cross_attention"):
        if fields.flag(name, False):
            raise UnsupportedError(f"{where}: {name} is true; only causal decoders run")
    return reader


def build_hf_config(values: Mapping[str, object], where: str) -> ModelConfig:
    """The config for the JSON object `values`. `where` names the file in messages."""
    reader = hf_reader(values, where)
    with config_from_file(where):
        return reader.config(Fields(where, values))
