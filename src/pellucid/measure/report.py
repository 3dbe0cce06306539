"""A profile as a picture and as a trace: the roofline plot (matplotlib, extra `plot`), and Chrome's
trace format, which Perfetto opens (ui.perfetto.dev).

The plot has arithmetic intensity across, FLOP/s upwards, both logarithmic. Roofs are the measured
bandwidth and peaks; each op is a dot, as large as its share of the phase's time.
"""

import json
from collections.abc import Iterator
from math import log10
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .profile import Phase, Profile, ProfiledStep

__all__ = ["plot_roofline", "write_trace"]

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
    figure.savefig(path)


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
    axes.annotate(
        f"memory: {bandwidth / 1e9:.1f} GB/s",
        (0.012, 0.012 * bandwidth),
        rotation=35,
        fontsize=8,
        color="0.3",
    )


def _draw_dots(axes: Any, phase: Phase) -> None:
    lines = [line for line in phase.ops if line.cost.flops and line.seconds > 0]
    axes.scatter(
        [line.cost.arithmetic_intensity for line in lines],
        [line.cost.flops / line.seconds for line in lines],
        s=[20 + 400 * line.seconds / phase.wall_seconds for line in lines],
        color=COLOURS[phase.name],
        alpha=0.7,
        label=f"{phase.name}, {phase.tokens_per_second:,.0f} tokens/s",
    )
    # Names of dots that lie close together stand in a column.
    named: list[tuple[float, float]] = []
    for line in lines:
        if line.seconds < NAMED_SHARE * phase.wall_seconds:
            continue
        x, y = line.cost.arithmetic_intensity, line.cost.flops / line.seconds
        above = sum(abs(log10(x / a)) < 0.4 and abs(log10(y / b)) < 0.2 for a, b in named)
        named.append((x, y))
        axes.annotate(
            line.name,
            (x, y),
            xytext=(10, 4 - 9 * above),
            textcoords="offset points",
            fontsize=7,
            color=COLOURS[phase.name],
        )


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
    title = f"{name}: {shape.num_tokens} tokens of {len(shape.q_lens)} requests"
    yield event(1, title, step.start, step.end - step.start)
    yield event(2, "schedule", step.start, times.schedule)
    yield event(2, "forward", forward, times.forward)
    after = step.start + times.schedule + times.execute
    batch = forward - step.start - times.schedule
    yield event(2, "batch", step.start + times.schedule, batch)
    yield event(2, "sampling", forward + times.forward, after - forward - times.forward)
    yield event(2, "text and outputs", after, times.update)
    for label, seconds in zip(labels, step.timed.seconds.tolist(), strict=True):
        yield event(3, label, forward, seconds)
        forward += seconds
