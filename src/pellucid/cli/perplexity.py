"""`pellucid perplexity`: how well a model predicts a text, and how far its predictions are from a
base model's.
"""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import FormatError
from ..units import format_bytes, format_count
from .inputs import open_input
from .options import ModelOptions, debug_option, json_option, model_options
from .terminal import one_line, say

if TYPE_CHECKING:
    from ..measure.divergence import Divergence
    from ..measure.logits_file import LogitsDtype
    from ..measure.perplexity import Estimate, Perplexity

__all__ = ["perplexity", "read_text"]

MAX_TEXT = 1 << 28  # bytes


@click.command()
@click.argument("text_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@model_options(generates=False)
@click.option(
    "--protocol",
    type=click.Choice(["llama.cpp", "papers"]),
    default="llama.cpp",
    show_default=True,
    help="How the text is cut and scored: by llama-perplexity, or by papers on quantization.",
)
@click.option(
    "--n-ctx",
    type=click.IntRange(8, 1 << 24),
    help="Tokens per chunk.  [default: 512; papers: 2048]",
)
@click.option(
    "--chunks", type=click.IntRange(min=1), help="Score the first so many chunks.  [default: all]"
)
@click.option(
    "--kl-base",
    metavar="MODEL",
    help="Compare with this model too, token by token: KL divergence, agreement, Δp. It must have "
    "the same vocabulary.",
)
@click.option(
    "--logits-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="With --kl-base: save what the base predicts in this new file. Without: compare with what "
    "the file holds.",
)
@click.option(
    "--logits-dtype",
    type=click.Choice(["float16", "float32"]),
    default="float16",
    show_default=True,
    help="Numbers of a new --logits-file.",
)
@json_option
@debug_option
def perplexity(
    text_file: Path,
    model: ModelOptions,
    protocol: str,
    n_ctx: int | None,
    chunks: int | None,
    kl_base: str | None,
    logits_file: Path | None,
    logits_dtype: "LogitsDtype",
    as_json: bool,
) -> None:
    """Measure how well a model predicts TEXT_FILE: exp of the mean negative log-likelihood per
    token.

    \b
    llama.cpp  chunks of 512 tokens, the second half of each scored: the figure
               of llama-perplexity
    papers     windows of 2,048 tokens, all scored but the first of each

    Figures of two protocols, or of two values of --n-ctx, cannot be compared. With --kl-base or
    --logits-file the model is also compared with a base, as by llama-perplexity --kl-divergence.
    Ctrl-C ends the run with the result so far.
    """
    from ..engine.options import build_engine_config
    from ..measure.evaluation import open_evaluation
    from ..measure.perplexity import PROTOCOLS, Perplexity
    from ..weights.hub import resolve_model

    # Check the options before a model is fetched.
    config = build_engine_config(model.fields())
    text = read_text(text_file)
    path = resolve_model(model.name, cache_dir=None, progress=True)
    base_path = resolve_model(kl_base, cache_dir=None, progress=True) if kl_base else None
    with open_evaluation(
        path,
        config,
        text,
        PROTOCOLS[protocol],
        n_ctx=n_ctx,
        chunks=chunks,
        base_path=base_path,
        logits_file=logits_file,
        logits_dtype=logits_dtype,
    ) as evaluation:
        if evaluation.new_file_bytes is not None:
            say(f"{logits_file} will have {format_bytes(evaluation.new_file_bytes)}")
        # Run to the end, or until Ctrl-C.
        num_chunks = len(evaluation.windows)
        result: Perplexity | Divergence | None = None
        interrupted = False
        start = time.monotonic()
        try:
            for result in evaluation.run():
                _show_progress(result, num_chunks, time.monotonic() - start)
        except KeyboardInterrupt:
            interrupted = True
        seconds = time.monotonic() - start
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    if result is None:  # interrupted before the first chunk
        raise KeyboardInterrupt
    # Show the result.
    own, divergence = (result, None) if isinstance(result, Perplexity) else (result.model, result)
    if as_json:
        record = {
            "model": str(path),
            "text": str(text_file),
            "protocol": protocol,
            "n_ctx": evaluation.windows.n_ctx,
            **asdict(own),
            "seconds": seconds,
            "complete": not interrupted,
        }
        if divergence is not None:
            compared = {"base_name": evaluation.base_name, **asdict(divergence)}
            del compared["model"]  # it is the record itself
            record["divergence"] = compared
        click.echo(json.dumps(record))
    else:
        chunks_scored = format_count(own.num_chunks, "chunk")
        scored = (
            f"protocol {protocol}, {chunks_scored} of {evaluation.windows.n_ctx}, "
            f"{format_count(own.num_scored_tokens, 'token')} scored"
        )
        click.echo(f"perplexity {own.perplexity:.4f} ± {own.error:.4f} ({scored})")
        if divergence is not None:
            _print_divergence(divergence, evaluation.base_name or "")
    if interrupted:
        without = "" if evaluation.new_file_bytes is None else f"; {logits_file} is not written"
        say(f"interrupted after {own.num_chunks} of {format_count(num_chunks, 'chunk')}{without}")
        raise click.exceptions.Exit(130)


def _show_progress(result: "Perplexity | Divergence", num_chunks: int, seconds: float) -> None:
    """On a terminal, show the progress of the run, its result so far, and the remaining time."""
    from ..measure.divergence import Divergence

    if not sys.stderr.isatty():
        return
    own = result.model if isinstance(result, Divergence) else result
    left = round(seconds / own.num_chunks * (num_chunks - own.num_chunks))
    line = (
        f"{own.num_chunks} of {format_count(num_chunks, 'chunk')} · "
        f"perplexity {own.perplexity:.4f} ± {own.error:.4f} · "
        f"about {left // 60}:{left % 60:02d} left"
    )
    click.echo(f"\r\x1b[K{line}", err=True, nl=False)


def _print_divergence(result: "Divergence", base: str) -> None:
    def plus_minus(estimate: "Estimate", scale: float, digits: int) -> str:
        return f"{scale * estimate.value:.{digits}f} ± {scale * estimate.error:.{digits}f}"

    tail = (
        f"median {result.kl_median:.6f}, 99 % {result.kl_99:.6f}, 99.9 % {result.kl_999:.6f}, "
        f"max {result.kl_max:.6f}"
    )
    rows = [
        ("beside the base", one_line(base)),
        ("perplexity of the base", f"{result.base.perplexity:.4f} ± {result.base.error:.4f}"),
        ("ratio of perplexities", f"{plus_minus(result.ratio, 1, 6)} (paired)"),
        ("KL divergence, nats", f"{plus_minus(result.kl, 1, 6)} ({tail})"),
        ("same likeliest token", f"{plus_minus(result.same_top, 100, 3)} %"),
        ("Δp, mean", f"{plus_minus(result.delta_p, 100, 3)} %"),
        ("Δp, root mean square", f"{plus_minus(result.delta_p_rms, 100, 3)} %"),
    ]
    for name, value in rows:
        click.echo(f"{name:<22}  {value}")


def read_text(path: Path) -> str:
    """The text of a file or a pipe. Its size is bounded."""
    with open_input(path) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise FormatError(f"{path} has more than {MAX_TEXT} bytes; cut a part of it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    if "\0" in text:
        raise FormatError(f"{path} is not a text: it has characters NUL")
    if not text.strip():
        raise FormatError(f"{path} is empty; give a file with text")
    return text
