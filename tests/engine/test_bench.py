"""`pellucid bench` on a tiny model, for real: its rows, its formats, what it refuses. No figure is
compared with a clock.
"""

import csv
import io
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pellucid.cli.main import main
from pellucid.measure.bench_model import BenchModel

from ..models.folders import write_folder

pytestmark = pytest.mark.slow  # each measures


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["bench", *map(str, arguments)])


def last_line(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads(result.output.splitlines()[-1])
    return report


SHORT = ("-p", "24", "-n", "3", "-pg", "8,2", "-d", "0,16", "-r", "2", "-t", "1")


def test_latency_has_llama_benchs_rows_and_ends_with_json(tiny_path: Path) -> None:
    result = run("latency", tiny_path, *SHORT)
    report = last_line(result)
    names = ["pp24", "tg3", "pp8+tg2", "pp24 @ d16", "tg3 @ d16", "pp8+tg2 @ d16"]
    assert [row["test"] for row in report["results"]] == names
    lines = [line for line in result.output.splitlines() if line.startswith("| tiny")]
    assert [line.split("|")[6].strip() for line in lines] == names
    for row in report["results"]:
        tokens = row["n_prompt"] + row["n_gen"]
        speeds = [tokens / ns * 1e9 for ns in row["samples_ns"]]
        assert row["samples_ts"] == pytest.approx(speeds, rel=1e-3)
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert row["bound"] in ("memory", "arithmetic")
        assert 0 < row["roof_share_least"] <= row["roof_share_most"]


def test_formats_hold_the_same_rows(tiny_path: Path) -> None:
    rows = last_line(run("latency", tiny_path, *SHORT, "-o", "json"))["results"]
    lines = run("latency", tiny_path, *SHORT, "-o", "jsonl").output.splitlines()
    assert [json.loads(line)["test"] for line in lines] == [row["test"] for row in rows]
    table = run("latency", tiny_path, *SHORT, "-o", "csv").output
    records = list(csv.DictReader(io.StringIO(table)))
    assert [record["test"] for record in records] == [row["test"] for row in rows]
    assert all(float(record["avg_ts"]) > 0 for record in records)
    markdown = run("latency", tiny_path, *SHORT, "-o", "md").output.splitlines()
    assert len(markdown) == 2 + len(rows) and all(line.startswith("|") for line in markdown)
    assert len({line.count("|") for line in markdown}) == 1


def test_each_size_of_a_step_and_number_of_threads_has_its_rows(tiny_path: Path) -> None:
    options = ("-p", "24", "-n", "0", "-r", "1", "-t", "1,2", "-ub", "8,16", "--no-roof")
    rows = last_line(run("latency", tiny_path, tiny_path, *options))["results"]
    assert [(row["n_threads"], row["n_ubatch"]) for row in rows] == 2 * [
        *[(1, 8), (1, 16), (2, 8), (2, 16)]
    ]
    assert {row["bound"] for row in rows} == {None}


def test_the_reference_has_no_roof(tiny_path: Path) -> None:
    options = ("-p", "8", "-n", "2", "-r", "1", "--backend", "reference")
    rows = last_line(run("latency", tiny_path, *options))["results"]
    assert [row["backends"] for row in rows] == ["reference"] * 2
    assert [row["roof_share_most"] for row in rows] == [None] * 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-p", "0", "-n", "0"), "-p and -n are 0: there is nothing to measure"),
        (("-d", "100000"), "was made for at most"),
        (("--kv-dtype", "int7"), "int7"),
        (("--quantization", "q4_7"), "quantization is 'q4_7'"),
        (("--isa", "avx9"), "avx9"),
        (("--against", "vllm"), "vllm is not installed"),
        (("--against", "llama.cpp", "--llama-cpp", "/nowhere"), "is not a program that can be run"),
        (("--against", "vllm", "--peer-python", "/nowhere/python"), "there is no such program"),
    ],
)
def test_what_cannot_be_measured_is_said_in_one_sentence(
    tiny_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = run("latency", tiny_path, "-p", "8", "-n", "2", *arguments)
    assert result.exit_code == 1
    assert sentence in result.output and len(result.output.splitlines()) == 1


def test_a_model_is_quantized_as_it_is_loaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama")
    row = last_line(run("latency", folder, *SHORT, "--quantization", "q8_0"))["results"][0]
    plain = last_line(run("latency", folder, *SHORT))["results"][0]
    assert row["model_size"] == plain["model_size"]  # of the file
    load = ("--num-prompts", "2", "--input-len", "7", "--output-len", "4", "-r", "1")
    assert last_line(run("throughput", folder, *load, "--quantization", "w8a8"))["results"]
    both = run("latency", folder, "--quantization", "q8_0", "--against", "llama.cpp")
    assert both.exit_code == 2 and "--quantization changes the model" in both.output


@pytest.mark.parametrize("value", ["x", "", "1,,2", "-1", "1.5", ",".join(["1"] * 100)])
def test_lists_are_whole_numbers(tiny_path: Path, value: str) -> None:
    assert run("latency", tiny_path, "-p", value).exit_code == 2
    assert run("latency", tiny_path, "-pg", value).exit_code == 2


def test_ctrl_c_leaves_what_was_measured(tiny_path: Path) -> None:
    command = ["bench", "latency", tiny_path, "-p", "8", "-n", "2", "-r", "2", "-t", "1"]
    command += ["-d", ",".join(str(n) for n in range(0, 60))]
    program = [sys.executable, "-m", "pellucid", *map(str, command)]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "tg2" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 130
    rows = json.loads(rest.splitlines()[-1])["results"]
    assert [row["test"] for row in rows[:2]] == ["pp8", "tg2"] and len(rows) < 120


def test_the_cache_behind_a_context_is_computed_once(tiny_path: Path) -> None:
    model = BenchModel(tiny_path, options={"threads": 1}, longest=64, chunk=16)
    model.fill(1, 40)
    assert model.filled == (1, 40)
    model.decode(1, 40, 3)
    model.prefill(1, 0, 8)
    assert model.filled == (1, 43)


def test_a_disturbed_reading_of_the_peaks_does_not_count(tiny_path: Path) -> None:
    roof = BenchModel(tiny_path, options={}, sequences=1, longest=16).roof
    assert roof is not None
    bandwidth = roof.take()
    first = roof._readings[0]
    expected = roof.least_seconds(bandwidth, 1, 0, 16, 16)
    roof._readings.insert(0, replace(first, peaks={k: p / 1e3 for k, p in first.peaks.items()}))
    assert roof.least_seconds(bandwidth, 1, 0, 16, 16) == expected


def test_the_roof_of_a_step_grows_with_its_tokens(tiny_path: Path) -> None:
    model = BenchModel(tiny_path, options={"threads": 1}, sequences=2, longest=64)
    roof = model.roof
    assert roof is not None
    now = roof.take()
    one, _ = roof.least_seconds(now, 1, 0, 16, 16)
    many, memory = roof.least_seconds(now, 2, 0, 32, 16)
    assert 0 < one < many and 0 <= memory <= many


def test_throughput_has_llama_batched_benchs_rows(tiny_path: Path) -> None:
    shape = ("-npp", "8,16", "-ntg", "3", "-npl", "1,4", "-r", "2", "-t", "2")
    result = run("throughput", tiny_path, *shape)
    rows = last_line(result)["results"]
    found = [(r["n_prompt"], r["n_gen"], r["n_sequences"], r["n_kv"]) for r in rows]
    assert found == [(8, 3, 1, 11), (8, 3, 4, 44), (16, 3, 1, 19), (16, 3, 4, 76)]
    for row in rows:
        prefill, decode = ([ns / 1e9 for ns in row[f"samples_ns_{p}"]] for p in ("pp", "tg"))
        many = row["n_sequences"]
        assert row["samples_ts_tg"] == pytest.approx([many * 3 / s for s in decode], rel=1e-3)
        together = [row["n_kv"] / (a + b) for a, b in zip(prefill, decode, strict=True)]
        assert row["samples_ts"] == pytest.approx(together, rel=1e-3)
    assert "| S_PP t/s " in result.output.splitlines()[0]


def test_sequences_may_be_more_than_a_step_has_tokens(tiny_path: Path) -> None:
    shape = ("-npp", "5", "-ntg", "2", "-npl", "9", "-ub", "4", "-r", "1")
    assert len(last_line(run("throughput", tiny_path, *shape))["results"]) == 1


def test_requests_go_through_the_whole_engine(tiny_path: Path, tmp_path: Path) -> None:
    load = ("--num-prompts", "5", "--input-len", "7", "--output-len", "4", "-r", "2")
    (row,) = last_line(run("throughput", tiny_path, *load))["results"]
    assert (row["num_requests"], row["num_input_tokens"], row["num_output_tokens"]) == (5, 35, 20)
    seconds = [ns / 1e9 for ns in row["samples_ns"]]
    assert row["samples_ts"] == pytest.approx([55 / s for s in seconds], rel=1e-3)
    assert row["requests_per_second"] == pytest.approx(sum(5 / s for s in seconds) / 2, rel=1e-3)
    # a file of prompts, two lines for three requests
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "ab", "max_tokens": 3}\n{"prompt": "a"}\n')
    load = ("--num-prompts", "3", "--output-len", "4", "--dataset", str(file), "-r", "1")
    (row,) = last_line(run("throughput", tiny_path, *load))["results"]
    assert (row["num_requests"], row["num_output_tokens"]) == (3, 10)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-npp", "100000"), "was made for at most"),
        (("--dataset", __file__), "--dataset needs --num-prompts"),
        (("--num-prompts", "1", "-ub", "8,16"), "takes one --batch-size"),
        (("--num-prompts", "1", "--against", "transformers"), "is measured beside vllm"),
        (("--num-prompts", "1", "--against", "llama.cpp"), "is measured beside vllm"),
        (("--num-prompts", "1", "--input-len", "1000000"), "max_model_len is 1000128"),
        (("--num-prompts", "1", "--dataset", __file__), "line 1"),
    ],
)
def test_what_throughput_cannot_measure_is_said_in_one_sentence(
    tiny_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    result = run("throughput", tiny_path, "-ntg", "2", "-npl", "1", *arguments)
    assert result.exit_code == 1
    assert sentence in result.output and len(result.output.splitlines()) == 1


def test_a_cold_start_is_a_fresh_process(tiny_path: Path) -> None:
    (row,) = last_line(run("latency", tiny_path, "--cold-start", "-r", "2", "-t", "1"))["results"]
    assert len(row["starts"]) == 2 and row["peer_starts"] == []
    for start in row["starts"]:
        assert 0 < start["first_token"] <= start["end"]
        assert start["peak"] > 1 << 20 or sys.platform != "linux"
