"""One line for many files: geometric means of the ratios, where several files may be one model in
several formats.

    same file       the mean over all files: each ratio is of one file on both sides
    best format     the mean over models, each in the format that serves either side best: our best
                    speed over the peer's best speed. A user chooses the format for the engine.
    peer's format   the mean over models, each in the file that the peer runs fastest: the ratio on
                    that very file
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig
from .bench_tests import geometric_mean

__all__ = ["Result", "Summary", "model_shape", "summarize"]


@dataclass(frozen=True, slots=True)
class Result:
    """One figure of one file, on both sides."""

    column: str  # "pp512"
    model: Hashable  # the same for all files of one model
    file: str
    ours: float  # tokens per second, medians of the rounds
    theirs: float
    ratio: float  # median of the paired rounds


@dataclass(frozen=True, slots=True)
class Summary:
    """Geometric means of one column."""

    column: str
    files: int
    models: int
    same_file: float
    best_format: float
    peer_format: float
    # of each model: (our fastest file, the peer's fastest file)
    choices: tuple[tuple[str, str], ...]


def summarize(results: Iterable[Result]) -> list[Summary]:
    """One summary per column, in the order of the results."""
    columns: dict[str, list[Result]] = {}
    for result in results:
        columns.setdefault(result.column, []).append(result)
    return [_summary(column, found) for column, found in columns.items()]


def _summary(column: str, results: Sequence[Result]) -> Summary:
    by_model: dict[Hashable, list[Result]] = {}
    for result in results:
        by_model.setdefault(result.model, []).append(result)
    ours = [max(found, key=lambda r: r.ours) for found in by_model.values()]
    theirs = [max(found, key=lambda r: r.theirs) for found in by_model.values()]
    return Summary(
        column,
        len(results),
        len(by_model),
        geometric_mean(r.ratio for r in results),
        geometric_mean(a.ours / b.theirs for a, b in zip(ours, theirs, strict=True)),
        geometric_mean(r.ratio for r in theirs),
        tuple((Path(a.file).name, Path(b.file).name) for a, b in zip(ours, theirs, strict=True)),
    )


def model_shape(config: ModelConfig) -> Hashable:
    """The same for files that hold one model in several formats: its architecture and sizes. Models
    of one shape are equally fast, so a second name would not be another model here.
    """
    return (
        config.architecture,
        config.num_layers,
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.vocab_size,
    )
