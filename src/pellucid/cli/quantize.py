"""`pellucid quantize`: writes a model with fewer bits per weight.

Progress goes to standard error, the report to standard output. The report has every tensor with its
format, its bytes and the error that rounding made.
"""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from ..files import check_output, files_of
from ..units import format_bytes, format_count
from ..weights import hub
from .options import debug_option, json_option
from .perplexity import read_text
from .quantize_auto import AUTO, check_auto_options, choose_auto, type_map_lines
from .quantize_folder import (
    bits_per_weight,
    calibration_windows,
    check_folder_options,
    quantize_folder,
    with_bar,
)
from .terminal import print_table, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..quant.method import Method, MethodName
    from ..quant.quantize import Plan, TensorReport
    from ..quant.source import Source
    from ..quant.type_map import FileType, Rule

__all__ = ["quantize"]

CHUNKS = 32  # of the calibration text
CALIBRATION_FILES = {"wikitext": "wikitext-2/wiki.valid.raw", "c4": "calibration/c4.txt"}


@click.command()
@click.argument("model", metavar="MODEL")
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "file_type",
    metavar="TYPE",
    help="f32 f16 bf16 q8_0 q6_k q5_k_m q5_k_s q5_1 q5_0 q4_k_m q4_k_s q4_1 q4_0 iq4_nl iq4_xs "
    "q3_k_l q3_k_m q3_k_s or q2_k: llama.cpp's names, each with its mixture of formats. "
    "int2: q2_k with error feedback. "
    "gptq-int{2,3,4,8}-g{32,64,128,-1}[-asym][-actorder], awq-int4-g{32,64,128}, w4a16[-g…], "
    "w8a16[-g…], w8a8 or int8: folders, with so many bits and inputs per scale (-1: a row has "
    "one).",
)
@click.option(
    "--type-map",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Formats of single tensors, which precede those of TYPE: lines PATTERN=FORMAT. A pattern "
    "is a regular expression that is searched in the tensor's name; the first one found counts. "
    "The word auto chooses all formats by measured damage, within the bytes of TYPE.",
)
@click.option(
    "--target-bpw",
    type=float,
    metavar="BITS",
    help="In place of --to: choose formats by measured damage, so that the file has at most so "
    "many bits per weight. Rules of --type-map FILE precede the choice.",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="Measure on this text which errors matter: a file, or wikitext or c4, which are files of "
    "the folder PELLUCID_DATA. It should not be the text that the model is judged by later.",
)
@click.option(
    "--imatrix",
    "imatrix_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="An importance matrix of `pellucid imatrix` or llama-imatrix, in place of a calibration.",
)
@click.option(
    "--method",
    type=click.Choice(["ef", "imatrix", "rtn"]),
    help="ef: error feedback, so that later weights make up for the errors of earlier ones. "
    "imatrix: errors weighted by importance, with llama-quantize's bytes. rtn: neither.  "
    "[default: ef with --calibration, imatrix with --imatrix, else rtn; folders have a method of "
    "their own, or rtn]",
)
@click.option(
    "--calibration-chunks",
    type=click.IntRange(min=1),
    help=f"Use so many chunks of 512 tokens of the calibration text.  [default: {CHUNKS}]",
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
    file_type: str | None,
    type_map: Path | None,
    target_bpw: float | None,
    calibration: str | None,
    imatrix_file: Path | None,
    method: "MethodName | None",
    calibration_chunks: int | None,
    allow_requantize: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL and write OUT, a GGUF file or a folder of safetensors.

    MODEL is a .gguf file, a folder of safetensors, or a name; a name that is not here is fetched.
    OUT appears whole or not at all. llama.cpp runs the files too; vLLM and transformers the
    folders.
    """
    from ..quant.folder_types import INT2, FolderType, find_type
    from ..quant.quantize import plan_quantization, write_quantized
    from ..quant.source import open_source
    from ..quant.type_map import read_rules, unused_rules

    # check the options before a model is fetched
    is_int2 = file_type is not None and file_type.lower() == INT2
    wanted = None if file_type is None else find_type(file_type)
    if calibration_chunks is not None and calibration is None:
        raise ConfigError(
            f"--calibration-chunks is {calibration_chunks}, and there is no --calibration"
        )
    chunks = calibration_chunks or CHUNKS
    if isinstance(wanted, FolderType):
        check_folder_options(
            wanted,
            method=method,
            calibration=calibration,
            imatrix_file=imatrix_file,
            type_map=type_map,
            target_bpw=target_bpw,
        )
        quantize_folder(
            hub.resolve_model(model, progress=True),
            out,
            wanted,
            text=None if calibration is None else read_text(_calibration_file(calibration)),
            chunks=chunks,
            allow_requantize=allow_requantize,
            as_json=as_json,
        )
        return
    is_auto = check_auto_options(wanted, type_map, target_bpw, calibration)
    rules: Sequence[Rule] = ()
    if type_map is not None and str(type_map) != AUTO:
        rules = read_rules(type_map)
    chosen = _choose_method(method, calibration, imatrix_file, is_auto)
    if is_int2 and chosen != "ef":
        raise ConfigError(
            "int2 is q2_k with error feedback, which needs a text; give --calibration, and no "
            "other --method"
        )
    _check_use(wanted, rules, chosen)
    text = None if calibration is None else read_text(_calibration_file(calibration))
    path = hub.resolve_model(model, progress=True)
    read = (type_map, imatrix_file, calibration and _calibration_file(calibration))
    check_output(out, [*files_of(path), *(file for file in read if file)])
    with open_source(path) as source:
        for rule in unused_rules(rules, source.specs):
            say(f"the type map's {rule.pattern.pattern:.100}={rule.format} decides for no tensor")
        windows = None
        if text is not None:
            windows = calibration_windows(source.checkpoint, text, chunks)
        auto = None
        if is_auto and windows is not None:
            auto = choose_auto(
                source, windows, wanted, target_bpw, rules, allow_requantize=allow_requantize
            )
        measured = _measure(source, chosen, imatrix_file, windows, calibration)
        if auto is not None:
            wanted, rules = auto.file_type, auto.rules
            measured = measured.with_more_importance(auto.importance)
        assert wanted is not None
        plan = plan_quantization(
            source,
            wanted,
            importance=measured.importance,
            is_calibrated=measured.is_calibrated,
            rules=rules,
            allow_requantize=allow_requantize,
        )
        say(_estimate(plan))
        written = write_quantized(
            source,
            out,
            plan,
            importance=measured.importance,
            encode=measured.encode(source, plan),
            added=measured.metadata,
        )
        with contextlib.closing(written):
            reports = list(with_bar(written, plan))
    if as_json:
        click.echo(json.dumps(_report(out, plan, reports) | type_map_lines(auto)))
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
    click.echo(
        f"\n{out}: {format_bytes(out.stat().st_size)}, {bits_per_weight(plan):.2f} bits per weight"
    )
    click.echo(f"tensors: {formats}")


def _choose_method(
    method: "MethodName | None", calibration: str | None, imatrix_file: Path | None, is_auto: bool
) -> "MethodName":
    """The method that the options mean. Raises ConfigError where one that is needed is missing, or
    one that is given has no use. `is_auto`: the text is also used to choose formats.
    """
    if calibration is not None and imatrix_file is not None:
        raise ConfigError("--calibration and --imatrix are both given; one of them is used")
    if method is None:
        return "ef" if calibration is not None else "imatrix" if imatrix_file is not None else "rtn"
    if method == "ef" and calibration is None:
        raise ConfigError("--method ef needs a calibration text; give --calibration")
    if method == "imatrix" and calibration is None and imatrix_file is None:
        raise ConfigError("--method imatrix needs --imatrix or --calibration")
    if method == "rtn" and (imatrix_file is not None or (calibration is not None and not is_auto)):
        given = "--calibration" if imatrix_file is None else "--imatrix"
        raise ConfigError(f"{given} is given, and --method rtn makes no use of it; leave one out")
    return method


def _check_use(wanted: "FileType | None", rules: "Sequence[Rule]", method: "MethodName") -> None:
    """Raise ConfigError for a calibrated method if no tensor gets a format that it could choose
    codes of.
    """
    from ..quant.type_map import DENSE

    formats = [] if wanted is None else [wanted.base, *(rule.format for rule in rules)]
    if method != "rtn" and formats and set(formats) <= set(DENSE):
        raise ConfigError(
            f"{formats[0]} is not quantized, and makes no use of a calibration or an importance "
            "matrix; leave them out"
        )


def _calibration_file(name: str) -> Path:
    """The file of a calibration text."""
    if name not in CALIBRATION_FILES:
        return Path(name)
    folder = os.environ.get("PELLUCID_DATA")
    if not folder:
        raise ConfigError(
            f"--calibration is {name!r}, a file of the folder PELLUCID_DATA, which is not set; set "
            "it, or give a file"
        )
    return Path(folder, CALIBRATION_FILES[name])


def _measure(
    source: "Source",
    method: "MethodName",
    imatrix_file: Path | None,
    windows: "NDArray[np.int32] | None",
    name: str | None,
) -> "Method":
    """Read or measure what the method needs."""
    from ..quant.imatrix import read_imatrix
    from ..quant.method import Method, feedback_method, imatrix_method, measure_importance

    if method == "rtn":
        return Method()
    if imatrix_file is not None:
        return imatrix_method(read_imatrix(imatrix_file), str(imatrix_file))
    assert windows is not None  # there is a calibration text
    if method == "ef":
        return feedback_method(windows)
    say(f"measuring importance on {format_count(windows.size, 'token')}")
    return imatrix_method(measure_importance(source.path, windows, str(name)), str(name))


def _estimate(plan: "Plan") -> str:
    return (
        f"{format_bytes(plan.source_bytes)} of weights become {format_bytes(plan.num_bytes)} as "
        f"{plan.file_type.name}, {bits_per_weight(plan):.2f} bits per weight"
    )


def _report(out: Path, plan: "Plan", reports: "list[TensorReport]") -> dict[str, Any]:
    return {
        "file": str(out),
        "type": plan.file_type.name,
        "file_bytes": out.stat().st_size,
        "bits_per_weight": round(bits_per_weight(plan), 4),
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
