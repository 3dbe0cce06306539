"""`pellucid imatrix`: how much each column of each weight matters, measured on a text."""

from pathlib import Path

import click

from ..files import check_output, files_of
from ..units import format_count
from ..weights import hub
from .options import debug_option
from .perplexity import read_text
from .terminal import progress_bar, say

__all__ = ["imatrix"]


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--text",
    "text_file",
    metavar="FILE",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The calibration text. It should not be the text that the model is judged by later.",
)
@click.option(
    "-o",
    "--out",
    metavar="OUT",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write, in llama.cpp's GGUF format.",
)
@click.option(
    "--n-ctx",
    type=click.IntRange(8, 1 << 20),
    default=512,
    show_default=True,
    help="Tokens per chunk. Each chunk is a sequence of its own.",
)
@click.option(
    "--chunks", type=click.IntRange(min=1), help="Use the first so many chunks.  [default: all]"
)
@click.option(
    "--process-output", is_flag=True, help="Measure also the input of the matrix of the logits."
)
@debug_option
def imatrix(
    model: str, text_file: Path, out: Path, n_ctx: int, chunks: int | None, process_output: bool
) -> None:
    """Run a calibration text through MODEL and write its importance matrix.

    The importance of a column is the mean square of its input. `pellucid quantize --imatrix` and
    llama-quantize weigh rounding errors by it. MODEL is best a float model; a quantized one works
    too.
    """
    from ..errors import ConfigError
    from ..quant.calibrate import cut_calibration
    from ..quant.imatrix import collect_imatrix, write_imatrix
    from ..tokenizer import load_tokenizer
    from ..weights.checkpoint import open_checkpoint

    check_output(out, [text_file])
    text = read_text(text_file)
    path = hub.resolve_model(model, progress=True)
    check_output(out, files_of(path))
    with open_checkpoint(path) as checkpoint:
        config = checkpoint.config
        if n_ctx > config.max_position_embeddings:
            raise ConfigError(
                f"n_ctx is {n_ctx}; {checkpoint.path.name} sees at most "
                f"{config.max_position_embeddings} tokens at once"
            )
        windows = cut_calibration(load_tokenizer(checkpoint.tokenizer_source), text, n_ctx, chunks)
        say(
            f"{format_count(len(windows), 'chunk')} of {n_ctx} tokens through "
            f"{format_count(config.num_layers, 'layer')}"
        )
        with progress_bar(total=config.num_layers, unit="layer") as bar:
            matrix = collect_imatrix(
                checkpoint, windows, str(text_file), with_output=process_output, on_layer=bar.update
            )
    write_imatrix(out, matrix)
    click.echo(f"{out}: {format_count(len(matrix.entries), 'weight')}, {windows.size} tokens")
