"""A comparison as a picture (matplotlib, extra `plot`): bytes of the file against KL divergence, on
a logarithmic axis; and decode speed beside it, if it was measured.

Dominated models are pale. A line joins the others, from the smallest to the largest. The picture is
opaque, so that it is readable on a dark page too.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .compare_report import Report, Row
from .plot_labels import Box, name_dot, points_of

__all__ = ["check_plot", "draw_comparison", "plot_comparison"]

COLOUR, PALE, GREY = "#0072b2", "#a9c7da", "0.45"
DOT = 5  # points across
FIGURE_INCHES = (9.0, 4.2)
SUFFIXES = (".svg", ".png", ".pdf")


def check_plot(path: Path) -> None:
    """Raise ConfigError if no picture can be written to `path`."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: install pellucid with the extra `plot`"
        ) from error
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"--plot is {str(path)!r}; its suffix must be {', '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot is {str(path)!r}; there is no folder {str(path.parent)!r}")


def plot_comparison(report: Report, path: Path) -> None:
    """Write the picture to `path`, in the format of its suffix."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "pellucid"}):  # the same report gives the same file
        figure = Figure(figsize=FIGURE_INCHES, layout="constrained")
        FigureCanvasAgg(figure)
        draw_comparison(report, figure)
        figure.savefig(path, facecolor="white", metadata={"Date": None} if _is_svg(path) else None)


def draw_comparison(report: Report, figure: Any) -> None:
    """Draw into a Figure of matplotlib."""
    prefix = _common_prefix([row.name for row in report.results])
    has_speed = any(row.decode is not None for row in report.results)
    if has_speed:
        loss, speed = figure.subplots(1, 2, width_ratios=[3, 2])
        _draw_speed(speed, report.results, prefix)
    else:
        loss = figure.subplots()
    _draw_loss(loss, report)
    figure.suptitle(
        f"{prefix.rstrip('-_./ ') or 'models'} beside {report.base.removeprefix(prefix)}: "
        f"{report.results[-1].num_scored_tokens:,} tokens",
        fontsize=10,
        parse_math=False,
    )
    figure.draw_without_rendering()  # settles where points lie
    _name_dots(loss, report, prefix)


def _draw_loss(axes: Any, report: Report) -> None:
    """Megabytes across, nats upwards."""
    axes.set_yscale("log")
    points = _points(report)
    # the border of what is not dominated
    free = sorted(at for row, at in points if row.dominated_by is None)
    axes.plot(*zip(*free, strict=True), color=COLOUR, linewidth=0.8, alpha=0.6, zorder=1)
    for row, at in points:
        axes.scatter(
            *at, s=DOT**2 * 1.6, color=COLOUR if row.dominated_by is None else PALE, zorder=2
        )
    # the base has no place on a logarithmic axis
    base = report.results[0]
    axes.axvline(base.file_bytes / 1e6, color=GREY, linewidth=0.8, linestyle=":")
    if report.noise_floor is not None:
        axes.axhline(report.noise_floor.kl.value, color=GREY, linewidth=0.8, linestyle="--")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("file, MB", fontsize=8)
    axes.set_ylabel("mean KL divergence from the base, nats", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_speed(axes: Any, rows: Sequence[Row], prefix: str) -> None:
    """One bar for each model: the median of the rounds, and a line from the least to the most."""
    shown = [row for row in rows if row.decode is not None]
    for place, row in enumerate(shown):
        colour = GREY if row.is_base else COLOUR if row.dominated_by is None else PALE
        axes.barh(place, row.decode, color=colour, height=0.6)
        axes.hlines(
            place, min(row.decode_samples), max(row.decode_samples), color="black", linewidth=1
        )
        axes.text(max(row.decode_samples), place, f" {row.decode:.1f}", va="center", fontsize=7)
    names = [row.name.removeprefix(prefix) for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("decode, tokens/s", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def _name_dots(axes: Any, report: Report, prefix: str) -> None:
    """Names of the dots and the lines. No name covers another, a dot or a line."""
    points = _points(report)
    left, right = (points_of(axes, (x, 1.0))[0] for x in axes.get_xlim())
    low, high = (points_of(axes, (0.0, y))[1] for y in axes.get_ylim())
    base_x = points_of(axes, (report.results[0].file_bytes / 1e6, 1.0))[0]
    taken: list[Box] = [(base_x - 1, low, base_x + 1, high)]
    for _, at in points:
        x, y = points_of(axes, at)
        taken.append((x - DOT, y - DOT, x + DOT, y + DOT))
    if report.noise_floor is not None:
        y = points_of(axes, (1.0, report.noise_floor.kl.value))[1]
        taken.append((left, y - 1, right, y + 10))
        axes.annotate(
            "noise floor",
            (axes.get_xlim()[0], report.noise_floor.kl.value),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=7,
            color=GREY,
        )
    for row, at in sorted(points, key=lambda found: found[0].dominated_by is not None):
        colour = "black" if row.dominated_by is None else GREY
        name = row.name.removeprefix(prefix)
        name_dot(axes, name, at, DOT / 2, taken, color=colour, within=(left, right))
    name_dot(
        axes,
        report.base.removeprefix(prefix),
        (report.results[0].file_bytes / 1e6, _middle(axes)),
        1,
        taken,
        color=GREY,
        within=(left, right),
    )


def _points(report: Report) -> list[tuple[Row, tuple[float, float]]]:
    """The models with a divergence, and their places. One of 0 stands below all others."""
    rows = [(row, row.kl.value) for row in report.results if row.kl is not None]
    positive = [kl for _, kl in rows if kl > 0]
    if report.noise_floor is not None and report.noise_floor.kl.value > 0:
        positive.append(report.noise_floor.kl.value)
    least = min(positive, default=1e-9) / 3
    return [(row, (row.file_bytes / 1e6, max(kl, least))) for row, kl in rows]


def _middle(axes: Any) -> float:
    """The middle of the logarithmic axis."""
    low, high = axes.get_ylim()
    return float((low * high) ** 0.5)


def _common_prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to a separator, if something is left of each."""
    first, last = min(names), max(names)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    end = max(first[:same].rfind(mark) for mark in "-_./ ") + 1
    return first[:end] if all(len(name) > end for name in names) else ""


def _is_svg(path: Path) -> bool:
    return path.suffix == ".svg"
