"""`pellucid bench --against` with the real peers, on a real model. Speeds are not judged: rows,
facts and ratios are.
"""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pellucid.cli.main import main

needs_llama_bench = pytest.mark.skipif(
    shutil.which("llama-bench") is None, reason="llama-bench is not on PATH: install llama.cpp"
)
needs_transformers = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("transformers", "torch", "gguf", "accelerate")),
    reason="transformers reads GGUF with torch, gguf and accelerate (the extra `oracle`)",
)
Find = Callable[[str], Path]
MODEL = "smollm2-135m-instruct-q4_1"


def run(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["bench", *map(str, arguments), "-o", "json", "-t", "1"])
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.output.splitlines()[-1])
    return report


def check(row: dict[str, Any], suffix: str = "") -> None:
    ratios = [
        ours / theirs
        for ours, theirs in zip(
            row[f"samples_ts{suffix}"], row[f"peer_samples_ts{suffix}"], strict=True
        )
    ]
    spread = row[f"ratio_spread{suffix}"]
    assert (spread["least"], spread["most"]) == pytest.approx((min(ratios), max(ratios)))


@needs_llama_bench
def test_latency_beside_llama_bench(real_model: Find) -> None:
    lengths = ("-p", "8", "-n", "2", "-pg", "8,2", "-d", "0,8", "-r", "2")
    report = run("latency", real_model(MODEL), *lengths, "--against", "llama.cpp")
    assert report["peer"]["name"] == "llama.cpp" and report["peer"]["backends"]
    assert len(report["results"]) == 6
    for row in report["results"]:
        check(row)
        assert set(row["peer_tried_ts"]) == {"-fa 0", "-fa 1"}


@needs_llama_bench
def test_throughput_beside_llama_batched_bench(real_model: Find) -> None:
    shape = ("-npp", "8", "-ntg", "2", "-npl", "1,2", "-r", "2", "--against", "llama.cpp")
    for row in run("throughput", real_model(MODEL), *shape)["results"]:
        check(row, "_pp")
        check(row, "_tg")


@needs_llama_bench
def test_a_cold_start_beside_llama_bench(real_model: Find) -> None:
    command = ("latency", real_model(MODEL), "--cold-start", "-r", "1", "--against", "llama.cpp")
    (row,) = run(*command)["results"]
    check(row)
    assert row["peer_starts"][0]["peak"] > 50e6


@needs_llama_bench
def test_files_of_one_model_have_a_common_mean(real_model: Find) -> None:
    path = real_model(MODEL)
    lengths = ("-p", "8", "-n", "0", "-r", "1", "--against", "llama.cpp")
    report = run("latency", path, path, *lengths)
    (summary,) = report["summary"]
    assert (summary["files"], summary["models"]) == (2, 1)


@needs_transformers
def test_latency_and_throughput_beside_transformers(real_model: Find) -> None:
    lengths = ("-p", "4", "-n", "1", "-r", "1", "--against", "transformers")
    report = run("latency", real_model(MODEL), *lengths)
    assert "PyTorch" in report["peer"]["version"]
    for row in report["results"]:
        check(row)
    shape = ("-npp", "4", "-ntg", "1", "-npl", "2", "-r", "1", "--against", "transformers")
    (row,) = run("throughput", real_model(MODEL), *shape)["results"]
    check(row, "_tg")
