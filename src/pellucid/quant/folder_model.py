"""A model as a Hugging Face folder holds it, whatever file it comes from: its tensors by their
names in the folder, and the small files beside them.

A folder's own tensors and files are used unchanged. For a GGUF file they are made: the tensors from
the model's parameters (`weights/unfold.py`), config.json and the tokenizer's files from metadata.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config import ModelConfig
from ..errors import FormatError
from ..files import is_there, read_bytes, read_json
from ..formats import HostTensor, dequantize, encode_dense, quantize
from ..formats.tensor import TensorSpec
from ..models.params import Param, split_name
from ..models.registry import get_graph
from ..tokenizer import load_tokenizer
from ..tokenizer.to_folder import tokenizer_files
from ..weights.checkpoint import Checkpoint
from ..weights.families import hf_source_of
from ..weights.folds import Transpose
from ..weights.generation_config import read_generation_config
from ..weights.hf_values import hf_values
from ..weights.safetensors_checkpoint import SafetensorsCheckpoint
from ..weights.unfold import FileTensor, file_tensors
from .calibrate import Floats, Load, loader

__all__ = ["FolderModel"]

DENSE = ("F32", "F16", "BF16")
MAX_CONFIG_BYTES = 1 << 20
MAX_FILE_BYTES = 256 << 20
# the small files of a folder that belong to a quantized one too
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
)
_TEMPLATES = "additional_chat_templates"


class FolderModel:
    """An open checkpoint, seen as a folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.params: dict[str, Param] = {
            p.name: p for p in get_graph(self.config.graph).parameters(self.config)
        }
        self.load: Load = loader(checkpoint)
        self.tensors: Mapping[str, FileTensor] = file_tensors(
            self.config, hf_source_of(self.config.architecture)
        )
        self._specs = checkpoint.specs()
        # a folder's own tensors, unless they are packed: their names in its files
        self._folder = checkpoint if isinstance(checkpoint, SafetensorsCheckpoint) else None
        found = {} if self._folder is None else self._folder.dense_tensors()
        self._stored: dict[str, str] = {
            name: found[tensor.parameters[0]]
            for name, tensor in self.tensors.items()
            if tensor.parameters[0] in found
        }

    def matrix_shape(self, name: str) -> tuple[int, int] | None:
        """Outputs and inputs of a tensor that is the matrix of a linear layer of a layer; None for
        any other tensor, and for the lm_head.
        """
        tensor = self.tensors[name]
        for parameter in tensor.parameters:
            if self.params[parameter].group is None or split_name(parameter)[0] is None:
                return None
        rows, columns = tensor.shape
        return (columns, rows) if self.is_transposed(name) else (rows, columns)

    def is_transposed(self, name: str) -> bool:
        """Whether a matrix is stored as [in, out]."""
        return any(isinstance(fold, Transpose) for fold in self.tensors[name].folds)

    def spec(self, name: str) -> TensorSpec:
        """Format and shape of a tensor that is not quantized. A block format becomes float16."""
        format = self.source_format(name)
        return TensorSpec(format if format in DENSE else "F16", self.tensors[name].shape)

    def source_format(self, name: str) -> str:
        """The format of a tensor's values in the source."""
        if self._folder is not None and name in self._stored:
            return self._folder.stored_spec(self._stored[name]).format
        return self.tensors[name].format(self._specs)

    def dense(self, name: str, replaced: Mapping[str, Floats], format: str) -> NDArray[Any]:
        """The bytes of a tensor that is not quantized, in a dense format, with some parameters
        `replaced`.

        Raises FormatError for NaN, infinity, and values that the format cannot hold.
        """
        tensor = self.tensors[name]
        changed = {p: encode_dense(replaced[p]) for p in tensor.parameters if p in replaced}
        if self._folder is not None and name in self._stored and not changed:
            made = self._folder.stored(self._stored[name])
        else:
            made = tensor.build(self._parameters(tensor.parameters) | changed)
        if made.format != format:
            made = quantize(dequantize(made), format)
        _check(name, dequantize(made))
        return made.data

    def files(self, quantization: Mapping[str, Any]) -> dict[str, bytes]:
        """The small files of the folder, by name. `quantization` is `quantization_config`."""
        if self._folder is None:
            return _made_files(self.checkpoint, quantization)
        return _copied_files(self._folder.path, quantization)

    def _parameters(self, names: Collection[str]) -> dict[str, HostTensor]:
        others = self._specs.keys() - set(names)
        return dict(self.checkpoint.parameters(without=others))


def _copied_files(folder: Path, quantization: Mapping[str, Any]) -> dict[str, bytes]:
    """Those of another folder, with another `quantization_config`."""
    config = read_json(folder / "config.json", MAX_CONFIG_BYTES, within=folder)
    config["quantization_config"] = dict(quantization)
    names = [name for name in _COPIED if is_there(folder / name)]
    names += [p.relative_to(folder).as_posix() for p in folder.glob(f"{_TEMPLATES}/*.jinja")]
    copies = {name: read_bytes(folder / name, MAX_FILE_BYTES, within=folder) for name in names}
    return {"config.json": _to_json(config), **copies}


def _made_files(checkpoint: Checkpoint, quantization: Mapping[str, Any]) -> dict[str, bytes]:
    """Those of a GGUF file, from its metadata."""
    config, metadata = checkpoint.config, checkpoint.tokenizer_source
    assert not isinstance(metadata, Path)
    # without these fields, transformers takes ids of its own for each family
    ids: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    ends: list[int] = []
    tokenizer: dict[str, bytes] = {}
    if "tokenizer.ggml.model" in metadata:  # a GGUF file may have none
        loaded = load_tokenizer(metadata)
        ends = sorted(loaded.eos_token_ids)
        pad = metadata.get("tokenizer.ggml.padding_token_id")
        if not isinstance(pad, int) or not 0 <= pad < loaded.vocab_size:
            pad = None
        ids["bos_token_id"], ids["pad_token_id"] = loaded.bos_token_id, pad
        if ends:
            ids["eos_token_id"] = metadata.get("tokenizer.ggml.eos_token_id", ends[0])
        tokenizer = tokenizer_files(loaded, config.max_position_embeddings, pad)
    values = hf_values(config, str(checkpoint.path)) | ids
    # Gemma's activations exceed float16
    values["torch_dtype"] = "bfloat16" if config.graph == "gemma" else "float16"
    values["quantization_config"] = dict(quantization)
    generation = ids | ({"eos_token_id": ends} if ends else {})
    generation |= _sampling(read_generation_config(metadata))
    return {
        "config.json": _to_json(values),
        "generation_config.json": _to_json(generation),
        **tokenizer,
    }


def _sampling(recommended: Mapping[str, float | int]) -> dict[str, Any]:
    """Recommended sampling parameters as transformers writes them."""
    if recommended.get("temperature") == 0.0:
        return {"do_sample": False}
    names = {"max_tokens": "max_new_tokens"}
    values = {names.get(name, name): value for name, value in recommended.items()}
    return values | ({"do_sample": True} if "temperature" in values else {})


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _check(name: str, values: Floats) -> None:
    if not np.isfinite([values.min(), values.max()]).all():
        raise FormatError(
            f"tensor {name!r} holds NaN, infinity, or a value that float16 cannot hold; the file "
            "is damaged, or was quantized wrongly"
        )
