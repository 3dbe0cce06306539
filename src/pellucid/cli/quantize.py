"""`pellucid quantize`: writes a model with fewer bits per weight.

Progress goes to standard error, the report to standard output. The report has every tensor with its
format, its bytes and the error that rounding made.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..units import format_bytes
from ..weights import hub
from .options import debug_option, json_option
from .terminal import print_table, say

if TYPE_CHECKING:
    from ..quant.imatrix import ImportanceMatrix
    from ..quant.quantize import Plan, TensorReport

__all__ = ["quantize"]


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "file_type",
    metavar="TYPE",
    required=True,
    help="f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 iq4_nl iq4_xs "
    "q3_k_l q3_k_m q3_k_s or q2_k: llama.cpp's names, each with its mixture of formats.",
)
@click.option(
    "--imatrix",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="An importance matrix of `pellucid imatrix` or llama-imatrix: rounding errors count by "
    "how much each column matters.",
)
@click.option(
    "--type-map",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Formats of single tensors, which precede those of TYPE: lines PATTERN=FORMAT. A pattern "
    "is a regular expression that is searched in the tensor's name; the first one found counts.",
)
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Quantize a model that is quantized already. Errors add up.",
)
@json_option
@debug_option
def quantize(
    model: str,
    out: Path,
    file_type: str,
    imatrix: Path | None,
    type_map: Path | None,
    allow_requantize: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL and write OUT, a GGUF file.

    MODEL is a .gguf file or the name of one; a name that is not here is fetched. OUT appears whole
    or not at all, and llama.cpp runs it too.
    """
    from ..quant.imatrix import read_imatrix
    from ..quant.quantize import plan_quantization, write_quantized
    from ..quant.source import open_source
    from ..quant.type_map import find_file_type, read_rules

    wanted = find_file_type(file_type)
    rules = read_rules(type_map) if type_map is not None else ()
    matrix = None if imatrix is None else read_imatrix(imatrix)
    importance = None if matrix is None else matrix.importance()
    with open_source(hub.resolve_model(model, progress=True)) as source:
        plan = plan_quantization(
            source, wanted, importance=importance, rules=rules, allow_requantize=allow_requantize
        )
        say(_estimate(plan))
        added = {} if matrix is None else _provenance(imatrix, matrix)
        written = write_quantized(source, out, plan, importance=importance, added=added)
        with contextlib.closing(written):
            reports = list(_with_bar(written, plan))
    if as_json:
        click.echo(json.dumps(_report(out, plan, reports)))
        return
    rows = [
        [
            report.name,
            report.before.format,
            report.after.format,
            format_bytes(report.num_bytes),
            "" if report.error is None else f"{report.error:.3%}",
        ]
        for report in reports
    ]
    print_table(["tensor", "from", "to", "size", "error"], rows)
    counted = Counter(report.after.format for report in reports)
    formats = ", ".join(f"{count} {format}" for format, count in counted.most_common())
    click.echo(f"\n{out}: {format_bytes(out.stat().st_size)}, {_bits(plan):.2f} bits per weight")
    click.echo(f"tensors: {formats}")


def _provenance(file: Path | None, matrix: "ImportanceMatrix") -> dict[str, object]:
    """What llama-quantize writes of an importance matrix; it cuts texts to 127 bytes."""
    texts = {"file": str(file)}
    if matrix.datasets:
        texts["dataset"] = matrix.datasets[0]
    numbers = {"entries_count": len(matrix.entries), "chunks_count": matrix.chunk_count}
    values: dict[str, object] = {
        key: text.encode()[:127].decode(errors="ignore") for key, text in texts.items()
    }
    values |= {key: number for key, number in numbers.items() if number > 0}
    return {f"quantize.imatrix.{key}": value for key, value in values.items()}


def _with_bar(reports: "Iterator[TensorReport]", plan: "Plan") -> "Iterator[TensorReport]":
    """The same reports, beside a bar of the bytes that were read, on a terminal."""
    from tqdm import tqdm

    from ..formats import packed_bytes

    with tqdm(total=plan.source_bytes, unit="B", unit_scale=True, disable=None) as bar:
        for report in reports:
            bar.update(packed_bytes(report.before))
            yield report


def _bits(plan: "Plan") -> float:
    return 8 * plan.num_bytes / plan.num_weights


def _estimate(plan: "Plan") -> str:
    return (
        f"{format_bytes(plan.source_bytes)} of weights become {format_bytes(plan.num_bytes)} as "
        f"{plan.file_type.name}, {_bits(plan):.2f} bits per weight"
    )


def _report(out: Path, plan: "Plan", reports: "list[TensorReport]") -> dict[str, Any]:
    return {
        "file": str(out),
        "type": plan.file_type.name,
        "file_bytes": out.stat().st_size,
        "bits_per_weight": round(_bits(plan), 4),
        "tensors": [
            {
                "name": report.name,
                "shape": list(report.after.shape),
                "from": report.before.format,
                "to": report.after.format,
                "bytes": report.num_bytes,
                "relative_error": report.error,
                "has_importance": report.weighted,
            }
            for report in reports
        ],
    }
