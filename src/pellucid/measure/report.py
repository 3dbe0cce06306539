"""A profile as a picture and as a trace: the roofline plot (matplotlib, extra `plot`), and Chrome's
trace format, which Perfetto opens (ui.perfetto.dev).

The plot has arithmetic intensity across, FLOP/s upwards, both logarithmic. Roofs are the measured
bandwidth and peaks; each op is a dot, as large as its share of the phase's time.
"""

import json
from collections.abc import Iterator, Sequence
from math import atan2, degrees
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .plot_labels import Box, name_dot, points_of
from .profile import Line, Phase, Profile, ProfiledStep

__all__ = ["draw_roofline", "plot_roofline", "write_trace"]

COLOURS = {"prefill": "#0072b2", "decode": "#d55e00"}  # distinct for colour-blind people too
CACHE = 1 << 18  # bytes: small ops read what was just written
NAMED_SHARE = 0.02  # dots with a smaller share of the time have no name


def plot_roofline(profile: Profile, path: Path) -> None:
    """Write the roofline to `path`, in the format of its suffix (.svg, .png, .pdf)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib: install pellucid with the extra `plot`"
        ) from error
    figure = Figure(figsize=(9, 6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    if path.suffix.removeprefix(".") not in canvas.get_supported_filetypes():
        raise ConfigError(f"--plot is {str(path)!r}; its suffix must be .svg, .png or .pdf")
    draw_roofline(profile, figure)
    figure.savefig(path)


def draw_roofline(profile: Profile, figure: Any) -> None:
    """Draw the roofline into a Figure of matplotlib."""
    axes = figure.add_subplot(xscale="log", yscale="log")
    _draw_roofs(axes, profile)
    for phase in profile.phases:
        _draw_dots(axes, phase)
    axes.set_xlabel("arithmetic intensity, FLOP/byte")
    axes.set_ylabel("FLOP/s")
    axes.set_title(
        f"{profile.path.name}: {profile.ceilings.isa}, {profile.ceilings.threads} threads"
    )
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(loc="lower right")
    figure.draw_without_rendering()  # settles where points lie, in pixels
    _name_dots(axes, profile.phases, _name_slope(axes, max(profile.bandwidths)))


def _draw_roofs(axes: Any, profile: Profile) -> None:
    """The slope of the memory, and a ceiling for each kind of product."""
    bandwidth = max(profile.bandwidths)
    for label, peak, style in (
        ("int8", profile.ceilings.int8_peak, "-"),
        ("float32", profile.ceilings.float_peak, "--"),
    ):
        ridge = peak / bandwidth
        axes.plot(
            [0.01, ridge, 10_000], [0.01 * bandwidth, peak, peak], style, color="0.3", linewidth=1
        )
        axes.annotate(
            f"{label}: {peak / 1e9:,.0f} GOP/s",
            (10_000, peak),
            ha="right",
            va="bottom",
            fontsize=8,
            color="0.3",
        )
    cache = profile.ceilings.bandwidth_at(CACHE)
    axes.plot(
        [0.01, profile.ceilings.float_peak / cache],
        [0.01 * cache, profile.ceilings.float_peak],
        ":",
        color="0.3",
        linewidth=1,
        label=f"cache: {cache / 1e9:.0f} GB/s",
    )


def _name_slope(axes: Any, bandwidth: float) -> list[Box]:
    """Name the slope of the memory, below the line and along it. Returns boxes in points that cover
    the line, so that no other name crosses it.
    """
    scale = 72 / axes.figure.dpi
    places = [0.01 * 10 ** (i / 20) for i in range(120)]
    points = axes.transData.transform([(x, x * bandwidth) for x in places])
    (x0, y0), (x1, y1) = points[0], points[-1]
    axes.annotate(
        f"memory: {bandwidth / 1e9:.1f} GB/s",
        (places[6], places[6] * bandwidth),
        xytext=(4, -3),
        textcoords="offset points",
        rotation=degrees(atan2(y1 - y0, x1 - x0)),
        rotation_mode="anchor",
        va="top",
        fontsize=8,
        color="0.3",
    )
    return [(x * scale, y * scale, x * scale, y * scale) for x, y in points]


def _draw_dots(axes: Any, phase: Phase) -> None:
    lines = _plotted(phase)
    axes.scatter(
        [line.cost.arithmetic_intensity for line in lines],
        [line.cost.flops / line.seconds for line in lines],
        s=[_dot_area(line.seconds / phase.wall_seconds) for line in lines],
        color=COLOURS[phase.name],
        alpha=0.7,
        label=f"{phase.name}, {phase.tokens_per_second:,.0f} tokens/s",
    )


def _name_dots(axes: Any, phases: Sequence[Phase], lines: Sequence[Box]) -> None:
    """Name the dots that take the most time, the largest first. Names cover no other name, no large
    dot and none of `lines`.
    """
    dots = []
    for phase in phases:
        for line in _plotted(phase):
            if (share := line.seconds / phase.wall_seconds) < NAMED_SHARE:
                continue
            at = (line.cost.arithmetic_intensity, line.cost.flops / line.seconds)
            x, y = points_of(axes, at)
            dots.append((share, phase.name, line.name, at, x, y, _dot_area(share) ** 0.5 / 2))
    taken = [*lines, *((x - r, y - r, x + r, y + r) for *_, x, y, r in dots)]
    for _, phase_name, name, at, _, _, radius in sorted(dots, reverse=True):
        name_dot(axes, name, at, radius, taken, color=COLOURS[phase_name])


def _plotted(phase: Phase) -> list[Line]:
    """The ops that multiply; the others have no place on a logarithmic axis."""
    return [line for line in phase.ops if line.cost.flops and line.seconds > 0]


def _dot_area(share: float) -> float:
    """In square points, for a share of the phase's time."""
    return 20 + 400 * share


def write_trace(profile: Profile, path: Path) -> None:
    """Write all steps to `path`. The ops of a step are placed one after another from the beginning
    of its forward pass.
    """
    labels = [item.label for item in profile.program.items]
    steps = sorted(
        ((phase.name, step) for phase in profile.phases for step in phase.steps),
        key=lambda found: found[1].start,
    )
    origin = steps[0][1].start
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 1, "name": "process_name", "args": {"name": profile.path.name}}
    ]
    events += [
        {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name", "args": {"name": name}}
        for tid, name in ((1, "steps"), (2, "engine"), (3, "ops"))
    ]
    for name, step in steps:
        events += _events(name, step, labels, origin)
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), "utf-8")


def _events(
    name: str, step: ProfiledStep, labels: list[str], origin: float
) -> Iterator[dict[str, object]]:
    """One step as complete events; their times are microseconds."""

    def event(tid: int, title: str, start: float, seconds: float) -> dict[str, object]:
        return {
            "ph": "X",
            "pid": 1,
            "tid": tid,
            "name": title,
            "cat": name,
            "ts": (start - origin) * 1e6,
            "dur": seconds * 1e6,
        }

    shape, times, forward = step.timed.shape, step.times, step.timed.start
    # the engine began at step.start, or later if this process had to wait in between
    begin = max(step.start, forward + times.forward - times.schedule - times.execute)
    scheduled, after = begin + times.schedule, begin + times.schedule + times.execute
    title = f"{name}: {shape.num_tokens} tokens of {len(shape.q_lens)} requests"
    yield event(1, title, step.start, step.end - step.start)
    yield event(2, "schedule", begin, times.schedule)
    yield event(2, "forward", forward, times.forward)
    yield event(2, "batch", scheduled, max(0.0, forward - scheduled))
    sampling = forward + times.forward
    yield event(2, "sampling", sampling, max(0.0, after - sampling))
    yield event(2, "text and outputs", after, times.update)
    for label, seconds in zip(labels, step.timed.seconds.tolist(), strict=True):
        yield event(3, label, forward, seconds)
        forward += seconds
