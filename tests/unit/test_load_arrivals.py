"""Arrival processes by their distribution, with fixed seeds, and traces by their lines."""

import math
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from pellucid.errors import ConfigError, FormatError
from pellucid.measure.load_arrivals import random_arrivals, read_trace, scale_trace


def intervals(rate: float, burstiness: float, seed: int, count: int = 4000) -> np.ndarray:
    return np.diff(list(islice(random_arrivals(rate, burstiness, seed), count + 1)))


def test_intervals_of_poisson_arrivals_are_exponential() -> None:
    # Kolmogorov-Smirnov for each of 200 seeds: about 10 of them may exceed the limit of 5 %
    distances = []
    for seed in range(200):
        found = np.sort(intervals(5.0, 1.0, seed, 1000))
        expected = 1 - np.exp(-5.0 * found)
        steps = np.arange(len(found) + 1) / len(found)
        distances.append(max(np.max(steps[1:] - expected), np.max(expected - steps[:-1])))
    assert sum(distance > 1.36 / math.sqrt(1000) for distance in distances) <= 20


def test_counts_per_second_of_poisson_arrivals_are_poisson() -> None:
    # Chi-square of counts 0 … 7 and more at 3 per second; 8 degrees: 20.1 at 1 %
    seconds = 3000
    times = list(islice(random_arrivals(3.0, 1.0, 11), seconds * 4))
    counts = np.bincount([int(t) for t in times if t < seconds], minlength=seconds)
    share = [math.exp(-3) * 3**k / math.factorial(k) for k in range(8)]
    share.append(1 - sum(share))
    found = [int(np.sum(counts == k)) for k in range(8)] + [int(np.sum(counts >= 8))]
    chi = sum((n - seconds * p) ** 2 / (seconds * p) for n, p in zip(found, share, strict=True))
    assert chi < 20.1


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_burstiness_changes_the_spread_and_not_the_rate(burstiness: float) -> None:
    found = intervals(10.0, burstiness, 3, 20_000)
    assert found.mean() == pytest.approx(0.1, rel=0.05)
    # the coefficient of variation of a gamma distribution of shape k is 1 / √k
    assert found.std() / found.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_arrivals_begin_at_once_never_go_back_and_depend_on_the_seed_alone() -> None:
    times = list(islice(random_arrivals(2.0, 0.5, 7), 1000))
    assert times[0] == 0.0 and all(a <= b for a, b in pairwise(times))
    assert times == list(islice(random_arrivals(2.0, 0.5, 7), 1000))
    assert times != list(islice(random_arrivals(2.0, 0.5, 8), 1000))
    assert list(islice(random_arrivals(math.inf, 1.0, 0), 3)) == [0.0, 0.0, 0.0]


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
"""
MOONCAKE = (
    '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
    '{"timestamp": 1000, "input_length": 100, "output_length": 5, "hash_ids": [0]}\n'
)


def trace_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "trace"
    path.write_text(text, "utf-8")
    return path


def test_the_two_forms_of_traces(tmp_path: Path) -> None:
    first, second = read_trace(trace_file(tmp_path, AZURE))
    assert (first.arrival, first.input_length, first.output_length) == (0.0, 374, 44)
    assert second.arrival == pytest.approx(4.314579, abs=1e-6)
    found = read_trace(trace_file(tmp_path, MOONCAKE))  # sorted by arrival
    assert [(e.arrival, e.input_length, e.hash_ids) for e in found] == [
        (0.0, 100, (0,)),
        (2.0, 6758, (0, 1)),
    ]
    assert len(read_trace(trace_file(tmp_path, AZURE), 1)) == 1


def test_a_trace_is_scaled_to_a_mean_rate(tmp_path: Path) -> None:
    trace = scale_trace(read_trace(trace_file(tmp_path, MOONCAKE)), 4.0)
    assert [entry.arrival for entry in trace] == [0.0, 0.25]
    with pytest.raises(ConfigError, match="arrive at once"):
        scale_trace(trace[:1], 1.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a,b\n1,2\n", "neither a JSON object nor a CSV header"),
        (AZURE + "2023-11-16,1\n", "line 4, has 2 cells"),
        (AZURE + "yesterday,1,2\n", "line 4: TIMESTAMP is 'yesterday'"),
        (AZURE + "2023-11-16 18:15:46,-1,2\n", "line 4: ContextTokens is '-1'"),
        (AZURE + f"2023-11-16 18:15:46,{'9' * 30},2\n", "line 4: ContextTokens"),
        ('{"timestamp": 1}\n', "line 1: input_length is None"),
        ('{"timestamp": "1", "input_length": 1, "output_length": 1}\n', "must be milliseconds"),
        ('{"timestamp": 1, "input_length": 1, "output_length": 1, "hash_ids": "a"}\n', "hash_ids"),
        ('{"timestamp": 1,\n', "line 1 is not a JSON object"),
        ("{" + " " * (1 << 17), "longer than"),
    ],
)
def test_a_file_that_is_no_trace_is_told_with_its_line(
    tmp_path: Path, text: str, sentence: str
) -> None:
    with pytest.raises(FormatError, match=sentence):
        read_trace(trace_file(tmp_path, text))
