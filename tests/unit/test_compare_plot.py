"""The picture of a comparison: names that can be read, and the same file for the same result."""

from pathlib import Path

import pytest

from pellucid.measure.compare_plot import draw_comparison, plot_comparison
from pellucid.measure.compare_report import NoiseFloor, Report, Row
from pellucid.measure.perplexity import Estimate

pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")


def row(name: str, megabytes: float, kl: float | None) -> Row:
    one = Estimate(0.9, 0.01)
    loss = None if kl is None else Estimate(kl, kl / 50)
    return Row(
        name, name, "f16", kl is None, round(megabytes * 1e6), 4.5, 1000, 4, 1020, one, one, loss,
        kl, kl, kl, one, 900.0, 90.0, (880.0, 910.0), (85.0, 95.0), None,
    )  # fmt: skip


# many models of nearly one size and loss, one that loses nothing, and a name with formula's signs
CROWD = [row(f"model-Q4_{i}:kv=int8", 100 + i / 4, 0.05 + i / 500) for i in range(9)]
ROWS = (row("model-F16", 400, None), *CROWD, row("model-copy", 400, 0.0), row("model-$x_{", 90, 1))
FLOOR = NoiseFloor("reference", 4, Estimate(1e-6, 1e-8), 1e-6, 1e-5, 1e-4, Estimate(1.0, 0.0))
REPORT = Report("model-F16", "llama.cpp", "native", 512, 4, True, FLOOR, None, None, ROWS, None)


def test_no_name_covers_another() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw_comparison(REPORT, figure)
    figure.draw_without_rendering()
    names = [text for text in figure.axes[0].texts if text.get_text() != "noise floor"]
    assert len(names) == len(ROWS)
    boxes = [Text.get_window_extent(text) for text in names]  # without the line to the dot
    for i, box in enumerate(boxes):
        for other in boxes[:i]:
            assert not box.overlaps(other)


def test_the_same_result_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        plot_comparison(REPORT, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
