"""What a benchmark of one model runs, in llama-bench's words, and the statistics of its samples.

    pp512          a prompt of 512 tokens: tokens of the prompt per second
    tg128          128 tokens decoded one by one
    pp512+tg128    both, one after the other: all their tokens over the whole time
    … @ d4096      behind 4,096 tokens that are computed before, untimed

Every spread is that of paired rounds. The ratio of two engines is taken round by round, because
the speed of a shared machine drifts.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = [
    "MAX_TOKENS",
    "Ratio",
    "Test",
    "best_of",
    "build_tests",
    "geometric_mean",
    "mean_and_deviation",
]

MAX_TOKENS = 1 << 24  # of one test, and more than any model's context


@dataclass(frozen=True, slots=True)
class Test:
    """One row: `prompt` tokens, then `output` tokens, behind `depth` tokens."""

    __test__ = False  # it is no test of pytest's

    prompt: int
    output: int
    depth: int = 0

    @property
    def name(self) -> str:
        parts = [f"pp{self.prompt}"] if self.prompt else []
        parts += [f"tg{self.output}"] if self.output else []
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def num_tokens(self) -> int:
        """Those that are timed."""
        return self.prompt + self.output

    @property
    def context(self) -> int:
        """Tokens in the cache when it ends."""
        return self.depth + self.num_tokens


def build_tests(
    prompts: Sequence[int],
    outputs: Sequence[int],
    pairs: Sequence[tuple[int, int]],
    depths: Sequence[int],
) -> list[Test]:
    """The tests in llama-bench's order: at each depth the prompts, then the outputs, then the
    pairs. A length of 0 leaves its test out. Raises ConfigError where nothing is left.
    """
    shapes = [(p, 0) for p in prompts] + [(0, n) for n in outputs] + list(pairs)
    tests = [Test(p, n, depth) for depth in depths for p, n in shapes if p or n]
    if not tests:
        raise ConfigError("-p and -n are 0: there is nothing to measure")
    for test in tests:
        if test.context > MAX_TOKENS:
            raise ConfigError(
                f"{test.name} has {test.context} tokens; a test has at most {MAX_TOKENS}"
            )
    return list(dict.fromkeys(tests))


def mean_and_deviation(samples: Sequence[float]) -> tuple[float, float]:
    """The mean, and the standard deviation of a sample (n - 1); 0 of a single one."""
    return statistics.fmean(samples), statistics.stdev(samples) if len(samples) > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times as fast as the peer, over paired rounds."""

    median: float
    least: float
    lower: float  # quartile
    upper: float
    most: float
    rounds: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> "Ratio":
        """Of speeds, round by round; at least one round."""
        return cls.of_ratios([a / b for a, b in zip(ours, theirs, strict=True)])

    @classmethod
    def of_ratios(cls, ratios: Sequence[float]) -> "Ratio":
        median = statistics.median(ratios)
        if len(ratios) > 1:
            lower, _, upper = statistics.quantiles(ratios, n=4, method="inclusive")
        else:
            lower = upper = median
        return cls(median, min(ratios), lower, upper, max(ratios), len(ratios))


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers, at least one."""
    found = list(values)
    return math.exp(statistics.fmean(map(math.log, found)))


def best_of(speeds: Mapping[str, float]) -> str:
    """The name with the largest speed; the first of several."""
    return max(speeds, key=lambda name: speeds[name])
