"""Plot a run of `pellucid bench --against llama.cpp`: the ratios to llama.cpp's speed, with their
spread.

    pellucid bench latency MODEL … --against llama.cpp > latency.txt
    pellucid bench throughput MODEL … --against llama.cpp > throughput.txt
    python scripts/plot_peers.py latency.txt throughput.txt docs/peers.svg

Reads the JSON on the last line of each run, so no figure is typed by hand. Runs of the same file
and row count as more rounds of it. One panel per row of the benchmark (prefill, decode), one bar
per file: the median of the ratios, a line from the least to the largest, and the two speeds in
tokens per second. Needs matplotlib (the extra `plot`).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

OURS, PEER = "#2f6db5", "#8a8f98"


def draw(results: list[dict[str, Any]], target: Path) -> None:
    """Write the picture. `results`: rows of `read_run`, in the order to show."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "pellucid"  # the same run gives the same file
    by_shape: dict[str, list[dict[str, Any]]] = {}
    for row in results:
        by_shape.setdefault(row["shape"], []).append(row)
    # Two panels beside each other, each pair as high as its files need.
    columns = min(2, len(by_shape))
    shapes = list(by_shape.items())
    pairs = [shapes[i : i + columns] for i in range(0, len(shapes), columns)]
    heights = [max(len(rows) for _, rows in pair) + 1.5 for pair in pairs]
    figure, panels = plt.subplots(
        len(pairs),
        columns,
        figsize=(2.4 + 3.6 * columns, 0.5 + 0.24 * sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for pair, across in zip(pairs, panels, strict=True):
        for (shape, rows), panel in zip(pair, across, strict=False):
            same = [r["model"] for r in rows] == [r["model"] for r in pair[0][1]]
            _draw_panel(panel, shape, rows, with_names=panel is across[0] or not same)
        for panel in across[len(pair) :]:
            panel.set_axis_off()
    figure.suptitle(
        "Speed over llama.cpp's (dashed) on the same file; tokens per second, Pellucid : llama.cpp",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None}, facecolor="white")


def _draw_panel(panel: Any, shape: str, rows: list[dict[str, Any]], *, with_names: bool) -> None:
    """One bar per file."""
    for place, row in enumerate(rows):
        median = statistics.median(row["ratios"])
        panel.barh(place, median, color=OURS, height=0.62)
        panel.hlines(place, min(row["ratios"]), max(row["ratios"]), color="black", linewidth=1)
        ours, theirs = (statistics.median(row[name]) for name in ("ours", "theirs"))
        label = f" {median:.1f}×   {ours:,.0f} : {theirs:,.0f}"
        panel.text(max(median, *row["ratios"]), place, label, va="center", fontsize=7)
    panel.axvline(1, color=PEER, linewidth=1.2, linestyle="--")
    names = [row["model"] if with_names else "" for row in rows]
    panel.set_yticks(range(len(rows)), names, fontsize=8)
    panel.set_title(shape, fontsize=9)
    panel.set_xlim(0, 1.6 * max(max(row["ratios"]) for row in rows))
    panel.tick_params(axis="x", labelsize=8)
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.invert_yaxis()


def read_run(path: Path) -> list[dict[str, Any]]:
    """The rows of a run that were measured on both sides: model, shape, speeds, ratios."""
    report = json.loads(path.read_text(encoding="utf-8").strip().splitlines()[-1])
    rows = []
    for record in report["results"]:
        name = Path(record["model_filename"]).stem
        if report["bench"] == "latency":
            shapes = {record["test"]: ""}
        else:
            many = record["n_sequences"]
            shapes = {
                f"pp{record['n_prompt']}, {many} sequences": "_pp",
                f"tg{record['n_gen']}, {many} sequences": "_tg",
            }
        for shape, suffix in shapes.items():
            if f"ratio{suffix}" in record:
                ours = record[f"samples_ts{suffix}"]
                theirs = record[f"peer_samples_ts{suffix}"]
                ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
                speeds = {"ours": ours, "theirs": theirs, "ratios": ratios}
                rows.append({"model": name, "shape": shape, **speeds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="what `pellucid bench` printed")
    parser.add_argument("picture", type=Path, help="the .svg file to write")
    args = parser.parse_args()
    results: list[dict[str, Any]] = []
    for row in (row for run in args.runs for row in read_run(run)):
        before = [r for r in results if (r["model"], r["shape"]) == (row["model"], row["shape"])]
        if before:  # more rounds of the same row
            for name in ("ours", "theirs", "ratios"):
                before[0][name] += row[name]
        else:
            results.append(row)
    if not results:
        parser.error("no row stands beside llama.cpp; run `pellucid bench` with --against")
    draw(results, args.picture)


if __name__ == "__main__":
    main()
