"""`pellucid inspect`: describes a model from its headers. No weights are read, so it is fast for
any size.

A file that Pellucid cannot run can still be inspected: its tensors are listed, and the reason why
it cannot run replaces the configuration. Sizes are in bytes. Bits per weight are 8 · bytes /
weights, with the scales and minima of quantized blocks.
"""

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click

from ..config import ModelConfig
from ..errors import PellucidError
from ..kv_spec import build_kv_specs
from ..units import format_bytes
from ..weights import hub
from .options import debug_option, json_option
from .terminal import one_line, print_table

__all__ = ["inspect"]

_WRAPPING: dict[str, Any] = {
    "break_long_words": False,
    "break_on_hyphens": False,
    "replace_whitespace": False,
}
KV_ELEMENT_BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    format: str
    nbytes: int

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class _Model:
    """A model's description without its weights."""

    path: Path
    container: str  # "GGUF 3", "safetensors"
    name: str | None
    config: ModelConfig | None
    obstacle: str | None  # why there is no config: why Pellucid cannot run it
    tokenizer: str | None
    chat_template: str | None
    metadata: dict[str, object]
    tensors: list[_Tensor]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "--program",
    is_flag=True,
    help="Load the weights, and list the kernel calls of a step, their FLOPs and bytes.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 1 << 20),
    default=1,
    show_default=True,
    help="The step of --program: so many tokens.",
)
@json_option
@debug_option
def inspect(model: str, tensors: bool, program: bool, tokens: int, as_json: bool) -> None:
    """Show what MODEL is: architecture, configuration, formats, bits per weight, tokenizer.

    MODEL is a .gguf file, a folder of safetensors, or a name; a name that is not here is fetched.
    With --program: what runs, call by call.
    """
    path = hub.resolve_model(model, progress=True)
    if program:
        from .program import build_listing, print_listing, report_listing

        listing = build_listing(path, tokens)
        if as_json:
            click.echo(json.dumps(report_listing(listing), indent=2))
        else:
            print_listing(listing)
        return
    found = _read_folder(path) if path.is_dir() else _read_gguf(path)
    if as_json:
        click.echo(json.dumps(_report(found), indent=2))
        return
    _print_facts(found)
    click.echo()
    _print_formats(found.tensors)
    if tensors:
        click.echo()
        rows = [
            [t.name, t.format, " × ".join(map(str, t.shape)), format_bytes(t.nbytes)]
            for t in found.tensors
        ]
        print_table(["tensor", "format", "shape", "size"], rows)


def _read_gguf(path: Path) -> _Model:
    from ..weights.gguf import GGUFFile

    with GGUFFile.open(path) as file:
        said = file.metadata
        kinds = [
            str(said[key]) for key in ("tokenizer.ggml.model", "tokenizer.ggml.pre") if key in said
        ]
        config, obstacle = _read_config(path)
        described, template = _read_tokenizer(said, " ".join(kinds)) if kinds else (None, None)
        return _Model(
            path=path,
            container=f"GGUF {file.version}",
            name=_text(said.get("general.name")),
            config=config,
            obstacle=obstacle,
            tokenizer=described,
            chat_template=template or _text(said.get("tokenizer.chat_template")),
            metadata={
                key: _plain(said[key])
                for key in said
                if not key.startswith("tokenizer.") and not isinstance(said[key], list)
            },
            tensors=[_Tensor(t.name, t.shape, t.format, t.nbytes) for t in file.tensors.values()],
        )


def _read_folder(path: Path) -> _Model:
    from ..weights.safetensors_file import SafetensorsFile

    names = hub.choose_files(str(path), [entry.name for entry in path.iterdir() if entry.is_file()])
    tensors = []
    for file in (
        SafetensorsFile.open(path / name) for name in names if name.endswith(".safetensors")
    ):
        for name, spec in file.specs.items():
            tensors.append(_Tensor(name, spec.shape, spec.format, file.num_bytes(name)))
    config, obstacle = _read_config(path)
    container = "safetensors"
    if config is not None:
        container, tensors = _join_parts(path, tensors)
    described, template = _read_tokenizer(path, "tokenizer.json")
    return _Model(path, container, None, config, obstacle, described, template, {}, tensors)


def _join_parts(path: Path, tensors: Sequence[_Tensor]) -> tuple[str, list[_Tensor]]:
    """The container, with the method of its quantized matrices; and the tensors, each of these
    matrices as one. Its bytes are those of its parts.
    """
    from ..weights.safetensors_checkpoint import SafetensorsCheckpoint

    with SafetensorsCheckpoint.open(path) as checkpoint:
        matrices = checkpoint.packed_matrices()
    of_part = {f"{m.module}.{part}": name for name, m in matrices.items() for part in m.parts}
    sizes = dict.fromkeys(matrices, 0)
    joined = []
    for tensor in tensors:
        if tensor.name in of_part:
            sizes[of_part[tensor.name]] += tensor.nbytes
        else:
            joined.append(tensor)
    joined += [_Tensor(name, m.shape, m.format, sizes[name]) for name, m in matrices.items()]
    methods = sorted({m.quantization.method for m in matrices.values()})
    return ", ".join(["safetensors", *methods]), joined


def _read_tokenizer(
    source: Path | Mapping[str, object], kind: str
) -> tuple[str | None, str | None]:
    """(description of the tokenizer, or why it cannot be used; the chat template)."""
    from ..tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(source)
    except PellucidError as error:
        return f"none that can be used: {error}", None
    return f"{kind}, {tokenizer.vocab_size} tokens", tokenizer.chat_template


def _read_config(path: Path) -> tuple[ModelConfig | None, str | None]:
    """(config, None), or (None, the reason why the model cannot run)."""
    from ..weights.checkpoint import open_checkpoint

    try:
        with open_checkpoint(path) as checkpoint:
            return checkpoint.config, None
    except PellucidError as error:
        return None, str(error)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _plain(value: object) -> object:
    """A value for JSON, which has no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _formats(tensors: Sequence[_Tensor]) -> list[tuple[str, int, int, int]]:
    """(format, tensors, weights, bytes) by format, the one with the most weights first."""
    rows: dict[str, tuple[int, int, int]] = {}
    for t in tensors:
        count, weights, size = rows.get(t.format, (0, 0, 0))
        rows[t.format] = (count + 1, weights + t.num_weights, size + t.nbytes)
    return sorted(((name, *row) for name, row in rows.items()), key=lambda row: -row[2])


def _kv_bytes_per_token(config: ModelConfig) -> dict[str, int]:
    specs = build_kv_specs(config, "f32", "f32")
    numbers = sum(spec.num_kv_heads * (spec.k_dim + spec.v_dim) for spec in specs)
    return {name: numbers * size for name, size in KV_ELEMENT_BYTES.items()}


def _report(model: _Model) -> dict[str, Any]:
    weights, size = sum(t.num_weights for t in model.tensors), sum(t.nbytes for t in model.tensors)
    return {
        "path": str(model.path),
        "container": model.container,
        "name": model.name,
        "runs": model.config is not None,
        "obstacle": model.obstacle,
        "architecture": model.config.architecture
        if model.config
        else model.metadata.get("general.architecture"),
        "config": asdict(model.config) if model.config else None,
        "kv_bytes_per_token": _kv_bytes_per_token(model.config) if model.config else None,
        "weights": weights,
        "tensor_bytes": size,
        "bits_per_weight": _bits(size, weights),
        "formats": [
            {
                "format": name,
                "tensors": count,
                "weights": w,
                "bytes": s,
                "bits_per_weight": _bits(s, w),
            }
            for name, count, w, s in _formats(model.tensors)
        ],
        "tokenizer": model.tokenizer,
        "chat_template": model.chat_template,
        "metadata": model.metadata,
        "tensors": [
            {"name": t.name, "shape": t.shape, "format": t.format, "bytes": t.nbytes}
            for t in model.tensors
        ],
    }


def _print_facts(model: _Model) -> None:
    facts = [("file", f"{model.path} ({model.container})")]
    if model.name is not None:
        facts.append(("name", model.name))
    if model.config is None:
        facts.append(("does not run", str(model.obstacle)))
    else:
        config = model.config
        facts.append(("architecture", config.architecture))
        facts.append(("config", _sentence(config)))
        kv = _kv_bytes_per_token(config)
        whole = format_bytes(kv["float32"] * config.max_position_embeddings)
        facts.append(
            (
                "KV cache",
                f"{kv['float32']} bytes per token as float32, {whole} for all "
                f"{config.max_position_embeddings} tokens",
            )
        )
    facts.append(("tokenizer", model.tokenizer or "none"))
    facts.append(
        (
            "chat template",
            f"yes, {len(model.chat_template)} characters"
            if model.chat_template is not None
            else "none",
        )
    )
    for label, value in facts:
        click.echo(
            textwrap.fill(
                one_line(value),
                110,
                initial_indent=f"{label:<15}",
                subsequent_indent=" " * 15,
                **_WRAPPING,
            )
        )


def _sentence(config: ModelConfig) -> str:
    """The sizes, and each property in which the model differs from most models."""
    parts = []
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name == "rope" and config.rope is not None:
            parts.append(
                f"rope theta {config.rope.theta:g} over {config.rope.rotary_dim} dimensions, "
                f"scaling {config.rope.scaling}"
            )
        elif field.name == "windows":
            windows = [window for window in config.windows if window is not None]
            parts += (
                [f"window {min(windows)} in {len(windows)} of {config.num_layers} layers"]
                if windows
                else []
            )
        elif field.name not in ("architecture", "rope_local") and value != field.default:
            parts.append(
                field.name
                if value is True
                else f"{field.name} {value:g}"
                if isinstance(value, float)
                else f"{field.name} {value}"
            )
    return ", ".join(parts)


def _print_formats(tensors: Sequence[_Tensor]) -> None:
    rows = _formats(tensors)
    total = ("all", sum(r[1] for r in rows), sum(r[2] for r in rows), sum(r[3] for r in rows))
    cells = [
        [name, str(count), f"{weights:,}", format_bytes(size), f"{_bits(size, weights):.2f}"]
        for name, count, weights, size in [*rows, total]
    ]
    print_table(["format", "tensors", "weights", "size", "bits per weight"], cells)


def _bits(size: int, weights: int) -> float:
    return 8 * size / weights if weights else 0.0
