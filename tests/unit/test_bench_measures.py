"""The pure parts of `pellucid bench`: which rows there are, statistics, the summary of many files,
and what llama.cpp's programs print.
"""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pellucid.errors import ConfigError, PellucidError
from pellucid.measure.bench_peers import (
    find_program,
    parse_batched_bench,
    parse_llama_bench,
    parse_version,
)
from pellucid.measure.bench_rounds import Samples, run_rounds
from pellucid.measure.bench_summary import Result, summarize
from pellucid.measure.bench_tests import (
    Ratio,
    Test,
    build_tests,
    geometric_mean,
    mean_and_deviation,
)

CAPTURED = Path(__file__).parents[1] / "golden" / "llama_bench"
SPEEDS = st.floats(0.1, 1e5)


def test_rows_have_llama_benchs_names_and_order() -> None:
    tests = build_tests([512, 0], [128], [(512, 128)], [0, 4096])
    assert [test.name for test in tests] == [
        "pp512",
        "tg128",
        "pp512+tg128",
        "pp512 @ d4096",
        "tg128 @ d4096",
        "pp512+tg128 @ d4096",
    ]
    assert [test.context for test in tests] == [512, 128, 640, 4608, 4224, 4736]


def test_nothing_to_measure_is_said() -> None:
    with pytest.raises(ConfigError, match="-p and -n are 0"):
        build_tests([0], [0], [], [0, 512])


def test_names_are_those_of_a_real_llama_bench() -> None:
    runs = parse_llama_bench((CAPTURED / "llama-bench-0c1e570.json").read_text())
    names = [Test(run["n_prompt"], run["n_gen"], run["n_depth"]).name for run in runs]
    assert names == [test.name for test in build_tests([8], [2], [(8, 2)], [0, 16])]
    # its mean is the mean of the repetitions' speeds, and its deviation that of a sample
    for run in runs:
        tokens = run["n_prompt"] + run["n_gen"]
        mean, deviation = mean_and_deviation([tokens / ns * 1e9 for ns in run["samples_ns"]])
        assert mean == pytest.approx(run["avg_ts"], rel=1e-4)
        assert deviation == pytest.approx(run["stddev_ts"], rel=1e-3)


def test_rows_of_a_real_llama_batched_bench() -> None:
    text = (CAPTURED / "llama-batched-bench-0c1e570.txt").read_text()
    rows = parse_batched_bench("a warning\n" + text)
    assert [(row["pp"], row["tg"], row["pl"]) for row in rows] == [(8, 4, 1), (8, 4, 2)]
    assert rows[1]["speed_tg"] == pytest.approx(2 * 4 / rows[1]["t_tg"], rel=1e-4)


@pytest.mark.parametrize("out", ["", "[", "[]", "{}", '[{"avg_ts": 1}]', "null", "warning\n[1]"])
def test_an_answer_of_llama_bench_that_is_none_is_refused(out: str) -> None:
    with pytest.raises(PellucidError, match="llama-bench printed no result"):
        parse_llama_bench(out)
    with pytest.raises(PellucidError, match="llama-batched-bench printed no result"):
        parse_batched_bench(out)


def test_the_compiler_is_read_from_the_version() -> None:
    text = "version: 0.5.0-dev (build 1, commit 0c1e570)\nbuilt with GNU 12.2.0 for Linux x86_64\n"
    assert parse_version(text) == "GNU 12.2.0 for Linux x86_64"
    assert parse_version("error: unknown argument") == ""


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"llama-bench is not a program that can be run"):
        find_program("llama-bench", str(tmp_path))
    (tmp_path / "llama-bench").write_text("")
    with pytest.raises(ConfigError, match=r"llama-bench is not a program that can be run"):
        find_program("llama-bench", str(tmp_path / "llama-bench"))


@given(st.lists(st.tuples(SPEEDS, SPEEDS), min_size=1, max_size=20))
def test_a_ratio_lies_between_its_quartiles_and_these_between_the_extremes(
    rounds: list[tuple[float, float]],
) -> None:
    ours, theirs = [a for a, _ in rounds], [b for _, b in rounds]
    ratio = Ratio.of(ours, theirs)
    found = [ratio.least, ratio.lower, ratio.median, ratio.upper, ratio.most]
    assert all(a <= b * (1 + 1e-12) for a, b in pairwise(found))
    assert ratio.rounds == len(rounds)


def test_a_ratio_is_of_the_rounds_and_not_of_the_means() -> None:
    # Both are slowed by the same neighbour in the second round.
    ratio = Ratio.of([100.0, 10.0, 100.0], [50.0, 5.0, 50.0])
    assert (ratio.least, ratio.median, ratio.most) == (2.0, 2.0, 2.0)


@given(st.lists(SPEEDS, min_size=1, max_size=10))
def test_the_geometric_mean_of_inverses_is_the_inverse(values: list[float]) -> None:
    inverse = geometric_mean(1 / value for value in values)
    assert geometric_mean(values) == pytest.approx(1 / inverse)


def test_rounds_alternate_and_the_faster_variant_goes_on() -> None:
    calls: list[str] = []

    def ours() -> Sequence[float]:
        calls.append("ours")
        return [1.0, 2.0]

    def theirs(variant: str) -> Sequence[float]:
        calls.append(variant)
        return [2.0, 6.0] if variant == "-fa 1" else [3.0, 4.0]

    samples = [Samples(10), Samples(20)]
    rounds = run_rounds(samples, 3, ours, theirs=theirs, variants=("-fa 1", "-fa 0"))
    for _ in rounds:
        pass
    assert calls == ["ours", "-fa 1", "-fa 0", "ours", "-fa 0", "ours", "-fa 0"]
    assert samples[0].theirs == [3.0, 3.0, 3.0] and samples[0].variant == "-fa 0"
    assert samples[1].tried == {"-fa 1": pytest.approx(20 / 6), "-fa 0": 5.0}
    assert samples[1].ratio == Ratio(2.0, 2.0, 2.0, 2.0, 2.0, 3)


def test_an_interrupted_round_leaves_the_finished_ones() -> None:
    samples = Samples(10)

    def theirs(variant: str) -> Sequence[float]:
        if len(samples.ours) == 3:
            raise KeyboardInterrupt
        return [2.0]

    with pytest.raises(KeyboardInterrupt):
        for _ in run_rounds([samples], 5, lambda: [1.0], theirs=theirs):
            pass
    assert (len(samples.ours), len(samples.theirs)) == (3, 2)
    assert samples.ratio is not None and samples.ratio.rounds == 2


def test_formats_of_one_model_count_once_in_its_best() -> None:
    def result(model: str, format: str, ours: float, theirs: float) -> Result:
        return Result("tg128", model, f"/models/{model}-{format}.gguf", ours, theirs, ours / theirs)

    (found,) = summarize(
        [
            result("a", "q4_0", 300, 200),
            result("a", "q8_0", 200, 100),
            result("a", "q4_1", 400, 50),
            result("b", "q4_0", 90, 30),
        ]
    )
    assert (found.files, found.models) == (4, 2)
    assert found.same_file == pytest.approx((1.5 * 2 * 8 * 3) ** 0.25)
    assert found.best_format == pytest.approx((2 * 3) ** 0.5)  # 400 over 200, 90 over 30
    assert found.peer_format == pytest.approx((1.5 * 3) ** 0.5)
    assert found.choices == (("a-q4_1.gguf", "a-q4_0.gguf"), ("b-q4_0.gguf", "b-q4_0.gguf"))


def test_captured_runs_name_their_version() -> None:
    runs = json.loads((CAPTURED / "llama-bench-0c1e570.json").read_text())
    assert {run["build_commit"] for run in runs} == {"0c1e570"}
