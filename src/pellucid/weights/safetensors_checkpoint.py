"""A Hugging Face folder as a checkpoint: config.json beside one .safetensors file, or several and
their index.

A sharded model is read as one table of tensors. The index says which file holds each tensor, and is
checked against the files. It may only name files in the folder, without a path.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from ..config import ModelConfig
from ..errors import FormatError, UnsupportedError
from ..files import Closing, PartialFile, is_there, read_json
from ..formats.tensor import HostTensor, StoredMatrix, TensorSpec
from ..models.params import Param
from .families import SourceOf
from .hf_config import build_hf_config, hf_reader
from .packed import PackedMatrix, packed_source
from .plan import ParamSource, Plan, build_plan, read_plan, stored_matrices
from .quantization import read_quantization
from .safetensors_file import DTYPES, SafetensorsFile

__all__ = ["SafetensorsCheckpoint"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
QUANTIZE_CONFIG = "quantize_config.json"  # of older folders of GPTQ
MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20  # a hundred thousand tensors take 10 MB


@dataclass(frozen=True, slots=True)
class SafetensorsCheckpoint(Closing):
    """One folder. `_files` maps each tensor's name to the open file that holds it."""

    path: Path
    config: ModelConfig
    _files: dict[str, SafetensorsFile]
    _plan: Plan

    @classmethod
    def open(cls, path: Path, remote: Mapping[str, PartialFile] | None = None) -> Self:
        """Read config.json, open the files and check their tensors against the architecture's
        declaration. `remote`: .safetensors files that come from elsewhere, by name.
        """
        config_path = path / "config.json"
        if not is_there(config_path):
            raise FormatError(
                f"{path} has no config.json; a model's folder holds config.json and *.safetensors"
            )
        # the config of the model
        values = read_json(config_path, MAX_CONFIG_BYTES, within=path)
        config = build_hf_config(values, str(config_path))
        reader = hf_reader(values, str(config_path))
        # the places of its tensors; files of the bare model leave out the prefix of all names
        files = _open_files(path, remote or {})
        source = reader.source
        if not any(name.startswith(reader.prefix) for name in files):
            source = _without_prefix(source, reader.prefix)
        config = _untie(config, source, files)
        # check them against the graph's declaration
        specs = {name: file.specs[name] for name, file in files.items()}
        quantization = read_quantization(_with_quantize_config(path, values), str(config_path))
        if quantization is not None:
            source = packed_source(quantization, source, specs)
        if config.tie_word_embeddings:
            # equal to the embedding, which `_untie` has checked
            specs.pop("lm_head.weight", None)
        plan = build_plan(
            config, source, specs, str(path), DTYPES, lambda name: _is_empty_bias(name, files)
        )
        return cls(path, config, files, plan)

    @property
    def tokenizer_source(self) -> Path:
        return self.path

    def specs(self) -> dict[str, TensorSpec]:
        return {planned.name: planned.spec for planned in self._plan}

    def packed_matrices(self) -> dict[str, PackedMatrix]:
        """The quantized matrices of the folder, by the name that a plain one would have. A matrix
        that a family fuses is one.
        """
        folds = (planned.source.fold for planned in self._plan)
        return {f"{f.module}.weight": f for f in folds if isinstance(f, PackedMatrix)}

    def dense_tensors(self) -> dict[str, str]:
        """The tensor of the files that each parameter lies in, by canonical name, but for packed
        matrices.
        """
        return {
            planned.name: next(iter(planned.source.tensors))
            for planned in self._plan
            if not planned.source.packed
        }

    def stored(self, name: str) -> HostTensor:
        """A tensor as it lies in a file."""
        return self._files[name].tensor(name)

    def stored_spec(self, name: str) -> TensorSpec:
        """Format and shape of a tensor in a file."""
        return self._files[name].specs[name]

    def stored_matrices(self) -> dict[str, StoredMatrix]:
        return stored_matrices(self._plan, lambda name: self._files[name].place(name))

    def parameters(self, without: Collection[str] = ()) -> Iterator[tuple[str, HostTensor]]:
        plan = [p for p in self._plan if p.name not in without]
        return read_plan(plan, lambda name, scratch: self._files[name].tensor(name, scratch))

    def close(self) -> None:
        """Close the files. Tensors that were read stay readable."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def _open_files(folder: Path, remote: Mapping[str, PartialFile]) -> dict[str, SafetensorsFile]:
    """The open file of each tensor."""
    if is_there(folder / INDEX):
        return _open_shards(folder, remote)
    found = sorted({*folder.glob("*.safetensors"), *(folder / name for name in remote)})
    if folder / SINGLE in found:
        found = [folder / SINGLE]
    if len(found) > 1:
        raise FormatError(
            f"{folder} has {len(found)} .safetensors files and neither {SINGLE} nor {INDEX} to "
            "say which are the model"
        )
    if not found:
        if any(folder.glob("*.bin")):
            raise UnsupportedError(
                f"{folder} holds a pickled checkpoint (*.bin), which can run code when it is "
                "read; convert it to safetensors"
            )
        raise FormatError(f"{folder} has no .safetensors file")
    file = SafetensorsFile.open(found[0], remote.get(found[0].name))
    return dict.fromkeys(file.specs, file)


def _open_shards(folder: Path, remote: Mapping[str, PartialFile]) -> dict[str, SafetensorsFile]:
    index = folder / INDEX
    weight_map = read_json(index, MAX_INDEX_BYTES, within=folder).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise FormatError(f"{index} has no weight_map that names a file for each tensor")
    names = sorted({_check_shard_name(index, name) for name in weight_map.values()})
    missing = [n for n in names if n not in remote and not is_there(folder / n)]
    if missing:
        raise FormatError(f"{index} names the file {missing[0]!r}, which is not in the folder")
    # open the files, and check that they and the index agree
    shards = {name: SafetensorsFile.open(folder / name, remote.get(name)) for name in names}
    files = {tensor: shard for shard in shards.values() for tensor in shard.specs}
    for tensor, name in weight_map.items():
        if tensor not in shards[name].specs:
            raise FormatError(
                f"{index} says that {name} holds the tensor {tensor!r}, which it does not"
            )
    unnamed = [tensor for tensor in files if tensor not in weight_map]
    if unnamed:
        raise FormatError(
            f"{files[unnamed[0]].path} holds the tensor {unnamed[0]!r}, which {INDEX} does not name"
        )
    return {tensor: shards[name] for tensor, name in weight_map.items()}


def _check_shard_name(index: Path, name: object) -> str:
    if (
        not isinstance(name, str)
        or not name.endswith(".safetensors")
        or name != Path(name).name
        or "\\" in name
        or "\0" in name
    ):
        raise FormatError(
            f"{index} names the file {str(name)[:100]!r}; it must be a .safetensors file in the "
            "same folder"
        )
    return name


def _with_quantize_config(folder: Path, values: Mapping[str, object]) -> Mapping[str, object]:
    """The values of config.json, with those of AutoGPTQ's quantize_config.json if that says how
    the weights are quantized and config.json does not.
    """
    if values.get("quantization_config") is not None or not is_there(folder / QUANTIZE_CONFIG):
        return values
    older = read_json(folder / QUANTIZE_CONFIG, MAX_CONFIG_BYTES, within=folder)
    return {**values, "quantization_config": {"quant_method": "gptq", **older}}


def _is_empty_bias(name: str, files: Mapping[str, SafetensorsFile]) -> bool:
    """Whether a tensor is a bias of zeros beside a packed matrix. AutoGPTQ writes one for each
    matrix, also where the model has no biases.
    """
    module = name.removesuffix(".bias")
    if module == name or f"{module}.qweight" not in files:
        return False
    return not any(any(chunk) for chunk in files[name].chunks(name))


def _without_prefix(source: SourceOf, prefix: str) -> SourceOf:
    """The same source, in a file whose names lack `prefix`."""

    def stripped(config: ModelConfig, param: Param) -> ParamSource:
        found = source(config, param)
        tensors = {name.removeprefix(prefix): shape for name, shape in found.tensors.items()}
        return ParamSource(tensors, found.fold)

    return stripped


def _untie(
    config: ModelConfig, source: SourceOf, files: Mapping[str, SafetensorsFile]
) -> ModelConfig:
    """The config, untied if the file holds an lm_head that differs from the embedding, as in
    transformers. Some files of tied models hold an equal one. Of files that come in parts the
    sizes alone are compared.
    """
    shape = (config.vocab_size, config.hidden_size)
    (embedding,) = source(config, Param("embed_tokens.weight", shape)).tensors
    if not config.tie_word_embeddings or not {"lm_head.weight", embedding} <= files.keys():
        return config
    head, table = files["lm_head.weight"], files[embedding]
    # compare piece by piece, and only if the sizes are those of the config
    same = head.specs["lm_head.weight"] == table.specs[embedding] and (
        table.specs[embedding].shape != shape
        or head.is_partial
        or all(
            a == b
            for a, b in zip(head.chunks("lm_head.weight"), table.chunks(embedding), strict=True)
        )
    )
    return config if same else replace(config, tie_word_embeddings=False)
