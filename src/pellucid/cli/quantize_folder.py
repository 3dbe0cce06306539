"""`pellucid quantize` for types of folders: GPTQ, AWQ and compressed-tensors.

Progress and notes on exceptions go to standard error, the report to standard output.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..errors import ConfigError
from ..units import format_bytes
from .terminal import print_table, progress_bar, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..quant.folder_types import FolderType
    from ..quant.quantize import Plan, TensorReport
    from ..quant.writers import FolderPlan, FolderReport
    from ..weights.checkpoint import Checkpoint

__all__ = [
    "bits_per_weight",
    "calibration_windows",
    "check_folder_options",
    "quantize_folder",
    "with_bar",
]

_Report = TypeVar("_Report", "TensorReport", "FolderReport")

CALIBRATION_TOKENS = 512  # of a chunk


def check_folder_options(
    kind: "FolderType",
    *,
    method: str | None,
    calibration: str | None,
    imatrix_file: Path | None,
    type_map: Path | None,
    target_bpw: float | None,
) -> None:
    """Raise ConfigError for options that a type of folders does not have, or that it lacks."""
    options = {"--imatrix": imatrix_file, "--type-map": type_map, "--target-bpw": target_bpw}
    for option, value in options.items():
        if value is not None:
            raise ConfigError(f"{option} is for types of GGUF files; {kind.name} is one of folders")
    if method is not None and (method != "rtn" or kind.calibration == "needed"):
        allowed = "it needs --calibration and no method" if kind.calibration == "needed" else "rtn"
        raise ConfigError(f"--method is {method!r}; for {kind.name} it may be: {allowed}")
    if calibration is not None and (kind.calibration == "unused" or method == "rtn"):
        raise ConfigError(
            f"--calibration is given, and {kind.name} with --method rtn makes no use of it"
            if method == "rtn"
            else f"--calibration is given, and {kind.name} makes no use of it"
        )
    if calibration is None and method is None and kind.calibration != "unused":
        without = "" if kind.calibration == "needed" else ", or --method rtn for nearest values"
        raise ConfigError(
            f"{kind.name} needs a calibration text; give --calibration TEXT, a file or wikitext "
            f"or c4{without}"
        )


def quantize_folder(
    path: Path,
    out: Path,
    kind: "FolderType",
    *,
    text: str | None,
    chunks: int,
    allow_requantize: bool,
    as_json: bool,
) -> None:
    """Quantize the model at `path`, write the folder `out`, and print the report."""
    from ..quant.folder_model import FolderModel
    from ..quant.writers import plan_folder, write_folder
    from ..weights.checkpoint import open_checkpoint
    from ..weights.folder_writer import check_target

    with open_checkpoint(path) as checkpoint:
        model = FolderModel(checkpoint)
        plan = plan_folder(model, kind.layout, allow_requantize=allow_requantize)
        check_target(out, plan.num_bytes)
        say(_estimate(kind, plan))
        for note in plan.notes:
            say(note)
        windows = None if text is None else calibration_windows(checkpoint, text, chunks)
        written = write_folder(model, out, plan, kind.quantize(model, plan, windows))
        with contextlib.closing(written):
            reports = list(with_bar(written, plan))
    if as_json:
        click.echo(json.dumps(_report(out, kind, plan, reports)))
        return
    rows = [
        [
            report.name,
            report.before.format,
            report.format,
            format_bytes(report.num_bytes),
            "" if report.error is None else f"{report.error:.3%}",
        ]
        for report in reports
    ]
    print_table(["tensor", "from", "to", "size", "error"], rows)
    counted = Counter(report.format for report in reports)
    formats = ", ".join(f"{count} {format}" for format, count in counted.most_common())
    click.echo(
        f"\n{out}: {format_bytes(_folder_bytes(out))}, {bits_per_weight(plan):.2f} bits per weight"
    )
    click.echo(f"tensors: {formats}")


def calibration_windows(checkpoint: "Checkpoint", text: str, chunks: int) -> "NDArray[np.int32]":
    """The calibration text as windows [W, n] of the model's tokens."""
    from ..quant.calibrate import cut_calibration
    from ..tokenizer import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    n_ctx = min(CALIBRATION_TOKENS, checkpoint.config.max_position_embeddings)
    return cut_calibration(tokenizer, text, n_ctx, chunks)


def with_bar(reports: "Iterator[_Report]", plan: "Plan | FolderPlan") -> "Iterator[_Report]":
    """The same reports, beside a bar of the bytes that were read, on a terminal."""
    from ..formats import packed_bytes

    with progress_bar(total=plan.source_bytes, unit="B", unit_scale=True) as bar:
        for report in reports:
            bar.update(packed_bytes(report.before))
            yield report


def bits_per_weight(plan: "Plan | FolderPlan") -> float:
    """Of all weights together."""
    return 8 * plan.num_bytes / plan.num_weights


def _estimate(kind: "FolderType", plan: "FolderPlan") -> str:
    return (
        f"{format_bytes(plan.source_bytes)} of weights become {format_bytes(plan.num_bytes)} as "
        f"{kind.name}, {bits_per_weight(plan):.2f} bits per weight"
    )


def _folder_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _report(
    out: Path, kind: "FolderType", plan: "FolderPlan", reports: "list[FolderReport]"
) -> dict[str, Any]:
    return {
        "folder": str(out),
        "type": kind.name,
        "folder_bytes": _folder_bytes(out),
        "bits_per_weight": round(bits_per_weight(plan), 4),
        "notes": list(plan.notes),
        "tensors": [
            {
                "name": report.name,
                "shape": list(report.before.shape),
                "from": report.before.format,
                "to": report.format,
                "bytes": report.num_bytes,
                "relative_error": report.error,
            }
            for report in reports
        ],
    }
