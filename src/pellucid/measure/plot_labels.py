"""Places names beside the dots of a plot, so that none covers another name or a dot. Positions and
sizes are in points.
"""

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["FONT_POINTS", "Box", "name_dot", "points_of"]

FONT_POINTS = 7
Box = tuple[float, ...]  # left, bottom, right, top


def points_of(axes: Any, at: tuple[float, float]) -> tuple[float, float]:
    """Where a place of the axes lies. The figure must have been laid out before
    (`draw_without_rendering`).
    """
    x, y = (float(v) * 72 / axes.figure.dpi for v in axes.transData.transform(at))
    return x, y


def name_dot(
    axes: Any,
    name: str,
    at: tuple[float, float],
    radius: float,
    taken: list[Box],
    *,
    color: str,
    within: Sequence[float] = (),
) -> None:
    """Write `name` at the nearest place beside the dot at `at` that covers nothing in `taken`, to
    which its box is added. A name that is not right beside its dot gets a line to it. `within`: the
    least and the largest x that it may cover, in points.
    """
    x, y = points_of(axes, at)
    width = 0.65 * FONT_POINTS * len(name)
    for dx, dy in _offsets(radius + 3, width):
        box = (x + dx, y + dy - FONT_POINTS / 2, x + dx + width, y + dy + FONT_POINTS / 2)
        is_inside = not within or (within[0] <= box[0] and box[2] <= within[1])
        if is_inside and not any(_overlap(box, other) for other in taken):
            break
    taken.append(box)
    is_far = abs(dy) > FONT_POINTS or dx < 0
    axes.annotate(
        name,
        at,
        xytext=(dx, dy),
        textcoords="offset points",
        va="center",
        fontsize=FONT_POINTS,
        color=color,
        parse_math=False,
        arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5} if is_far else None,
    )


def _offsets(gap: float, width: float) -> Iterator[tuple[float, float]]:
    """Places of a name around its dot, the nearest first: right and left of it, then further and
    further below and above.
    """
    for step in range(40):
        for dy in {step * (FONT_POINTS + 2.0), -step * (FONT_POINTS + 2.0)}:
            yield gap + step, dy
            yield -gap - width - step, dy


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
