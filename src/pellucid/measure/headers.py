"""The inputs of a plan, from headers alone: a model's config, and the format and shape of each
parameter. No weight is read: of a model of the hub that is not here, `config.json` is fetched, or
the header of its GGUF file.

If only `config.json` is there, the shapes follow from it, and the format is its `torch_dtype`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from ..errors import ConfigError, FormatError
from ..files import read_json
from ..formats.tensor import TensorSpec
from ..models.registry import get_graph
from ..weights.catalogue import CATALOGUE
from ..weights.checkpoint import open_checkpoint
from ..weights.gguf_checkpoint import GGUFCheckpoint
from ..weights.hf_config import build_hf_config
from ..weights.hub import find_here, parse_hub_name, resolve_model
from ..weights.hub_config import fetch_config
from ..weights.hub_header import HubFile, open_hub_gguf

__all__ = ["Headers", "find_headers", "read_config_json", "read_headers"]

MAX_CONFIG_BYTES = 1 << 20
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True, slots=True)
class Headers:
    """A model that was not loaded."""

    path: Path
    config: ModelConfig
    specs: Mapping[str, TensorSpec]
    assumed_format: str | None  # where no file says what the weights are kept in


def find_headers(name: str) -> Path | HubFile:
    """The .gguf file, folder or config.json that `name` means. Of a hub model that is not here,
    `config.json` is fetched, or the header of its GGUF file is read there. Raises ConfigError or
    DownloadError.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        has_weights = any(path.glob("*.safetensors")) or any(path.glob("*.gguf"))
        return resolve_model(name) if has_weights else path / "config.json"
    if (found := find_here(name)) is not None:
        return found
    if (model := CATALOGUE.get(name.lower())) is not None:
        raise ConfigError(
            f"{model.name} is not on this machine, and its header cannot be read elsewhere; "
            f"`pellucid pull {model.name}` fetches its {model.num_bytes / 1e6:.0f} MB"
        )
    wanted = parse_hub_name(name)
    if wanted.quant is None and wanted.file is None:
        config = fetch_config(wanted.repo)
        if config is not None:
            return config
    return open_hub_gguf(name)


def read_headers(path: Path | HubFile) -> Headers:
    """Config and parameters of what `find_headers` found."""
    if isinstance(path, HubFile):
        with GGUFCheckpoint.open(path.path, path) as remote:
            return Headers(path.path, remote.config, remote.specs(), None)
    if path.name != "config.json":
        with open_checkpoint(path) as checkpoint:
            return Headers(path, checkpoint.config, checkpoint.specs(), None)
    values = read_config_json(path)
    config = build_hf_config(values, str(path))
    dtype = values.get("torch_dtype") or values.get("dtype") or "bfloat16"
    if dtype not in DTYPES:
        raise FormatError(
            f"{path}: torch_dtype is {str(dtype)[:40]!r}; it must be one of: {', '.join(DTYPES)}"
        )
    format = DTYPES[str(dtype)]
    declared = get_graph(config.graph).parameters(config)
    return Headers(path, config, {p.name: TensorSpec(format, p.shape) for p in declared}, format)


def read_config_json(path: Path) -> Mapping[str, object]:
    """The JSON object of a config.json."""
    return read_json(path, MAX_CONFIG_BYTES, within=path.parent)
