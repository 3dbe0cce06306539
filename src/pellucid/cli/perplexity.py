"""`pellucid perplexity`: how well a model predicts a text, by llama.cpp's protocol."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from ..errors import ConfigError, FormatError
from .answer import load_llm
from .options import ModelOptions, debug_option, json_option, model_options

__all__ = ["perplexity"]

MAX_TEXT = 1 << 28  # bytes


@click.command()
@click.argument("text_file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@model_options
@click.option(
    "--n-ctx",
    type=click.IntRange(8, 1 << 24),
    default=512,
    show_default=True,
    help="Tokens per chunk; the second half of each is scored.",
)
@click.option(
    "--chunks", type=click.IntRange(min=1), help="Score the first so many chunks.  [default: all]"
)
@json_option
@debug_option
def perplexity(
    text_file: Path, model: ModelOptions, n_ctx: int, chunks: int | None, as_json: bool
) -> None:
    """Measure how well a model predicts TEXT_FILE: exp of the mean negative log-likelihood per
    token.

    The protocol is llama-perplexity's, so the figures may be laid side by side: chunks of --n-ctx
    tokens, the second half of each scored.
    """
    from ..measure.perplexity import measure_perplexity

    text = _read_text(text_file)
    try:
        llm = load_llm(ModelOptions(model.name, {"max_model_len": n_ctx + 1, **model.values}))
    except ConfigError as error:
        raise ConfigError(f"with --n-ctx {n_ctx}: {error}") from None
    for result in measure_perplexity(llm, text, n_ctx=n_ctx, max_chunks=chunks):
        if sys.stderr.isatty():
            click.echo(
                f"\r{result.num_chunks} chunks: {result.perplexity:.4f} ± {result.error:.4f} ",
                err=True,
                nl=False,
            )
    if sys.stderr.isatty():
        click.echo(err=True)
    if as_json:
        click.echo(
            json.dumps(
                {"model": str(llm.path), "text": str(text_file), "n_ctx": n_ctx, **asdict(result)}
            )
        )
    else:
        scored = f"{result.num_chunks} chunks of {n_ctx}, {result.num_scored_tokens} tokens scored"
        click.echo(f"perplexity {result.perplexity:.4f} ± {result.error:.4f} ({scored})")


def _read_text(path: Path) -> str:
    """The text of a file or a pipe, of a bounded size."""
    with path.open("rb") as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise FormatError(f"{path} has more than {MAX_TEXT} bytes; cut a part of it")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text: byte {error.start} is wrong") from None
    if not text.strip():
        raise FormatError(f"{path} is empty; perplexity is measured on a text")
    return text
