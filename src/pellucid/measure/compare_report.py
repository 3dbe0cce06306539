"""The result of a comparison as plain data: a row for each model, the noise floor, the verdict. The
names of its fields are those of `pellucid compare --json`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .compare import OTHER_BACKEND, Comparison
from .compare_speed import ROUNDS, Speed, SpeedTest
from .compare_verdict import Candidate, Recommendation, find_dominators, recommend
from .divergence import Divergence
from .perplexity import Estimate

__all__ = ["NoiseFloor", "Report", "Row", "SpeedFacts", "build_report"]


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """The base beside itself on another backend."""

    backend: str
    num_chunks: int
    kl: Estimate
    kl_median: float
    kl_99: float
    kl_max: float
    same_top: Estimate


@dataclass(frozen=True, slots=True)
class SpeedFacts:
    """How the speeds were measured."""

    prompt: int  # tokens of the prefill
    output: int  # tokens that are decoded behind it
    rounds: int


@dataclass(frozen=True, slots=True)
class Row:
    """One model. None: not measured, or of the base."""

    name: str
    model: str  # its path
    kv_cache_dtype: str
    is_base: bool
    file_bytes: int
    bits_per_weight: float
    kv_bytes_per_token: int
    num_chunks: int
    num_scored_tokens: int
    perplexity: Estimate | None
    ratio: Estimate | None  # perplexity over the base's
    kl: Estimate | None
    kl_median: float | None
    kl_99: float | None
    kl_max: float | None
    same_top: Estimate | None
    prefill: float | None  # tokens/s, the median of the rounds
    decode: float | None
    prefill_samples: tuple[float, ...]
    decode_samples: tuple[float, ...]
    dominated_by: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """All that `pellucid compare` says. Divergences are in nats, shares between 0 and 1."""

    base: str
    protocol: str
    backend: str
    n_ctx: int
    num_chunks: int  # of the text
    complete: bool
    noise_floor: NoiseFloor | None
    noise_floor_obstacle: str | None  # why there is none
    speed: SpeedFacts | None
    results: tuple[Row, ...]  # the base is the first
    recommendation: Recommendation | None


def build_report(
    comparison: Comparison, speeds: Sequence[Speed], test: SpeedTest | None, *, is_complete: bool
) -> Report:
    """The result so far. Without a verdict unless all models were compared on the same chunks."""
    found = [comparison.result(i) for i in range(len(comparison.entries))]
    dominators: list[int | None] = [None] * len(found)
    recommendation = None
    if comparison.is_comparable:
        candidates = [_candidate(comparison, i, speeds[i]) for i in range(len(found))]
        dominators = find_dominators(candidates, comparison.loses_less)
        dominators[0] = None  # the base is what the others are judged by
        recommendation = recommend(candidates, dominators, comparison.noise_limit)
    floor = comparison.floor
    base = comparison.entries[0]
    return Report(
        base=base.name,
        protocol="llama.cpp",
        backend=base.config.backend,
        n_ctx=comparison.windows.n_ctx,
        num_chunks=len(comparison.windows),
        complete=is_complete,
        noise_floor=None if floor is None else _noise_floor(floor, base.config.backend),
        noise_floor_obstacle=comparison.floor_obstacle,
        speed=None if test is None else SpeedFacts(test.prompt, test.output, ROUNDS),
        results=tuple(
            _row(comparison, i, speeds[i], dominators[i]) for i in range(len(comparison.entries))
        ),
        recommendation=recommendation,
    )


def _candidate(comparison: Comparison, i: int, speed: Speed) -> Candidate:
    found, facts = comparison.result(i), comparison.facts[i]
    return Candidate(
        name=comparison.entries[i].name,
        file_bytes=facts.file_bytes,
        kv_bytes=facts.kv_bytes,
        kl=found.kl.value if found else 0.0,
        same_top=found.same_top.value if found else 1.0,
        prefill=_median(speed.prefill),
        decode=_median(speed.decode),
    )


def _noise_floor(found: Divergence, backend: str) -> NoiseFloor:
    return NoiseFloor(
        OTHER_BACKEND[backend],
        found.model.num_chunks,
        found.kl,
        found.kl_median,
        found.kl_99,
        found.kl_max,
        found.same_top,
    )


def _row(comparison: Comparison, i: int, speed: Speed, dominator: int | None) -> Row:
    entry, facts, found = comparison.entries[i], comparison.facts[i], comparison.result(i)
    # the perplexity of the base stands in the results of the others
    beside = comparison.result(comparison.groups[0][0]) if i == 0 else found
    own = None if beside is None else beside.base if i == 0 else beside.model
    return Row(
        name=entry.name,
        model=str(entry.path),
        kv_cache_dtype=facts.kv_dtypes,
        is_base=i == 0,
        file_bytes=facts.file_bytes,
        bits_per_weight=facts.bits_per_weight,
        kv_bytes_per_token=facts.kv_bytes,
        num_chunks=own.num_chunks if own else 0,
        num_scored_tokens=own.num_scored_tokens if own else 0,
        perplexity=Estimate(own.perplexity, own.error) if own else None,
        ratio=found.ratio if found else None,
        kl=found.kl if found else None,
        kl_median=found.kl_median if found else None,
        kl_99=found.kl_99 if found else None,
        kl_max=found.kl_max if found else None,
        same_top=found.same_top if found else None,
        prefill=_median(speed.prefill),
        decode=_median(speed.decode),
        prefill_samples=tuple(speed.prefill),
        decode_samples=tuple(speed.decode),
        dominated_by=None if dominator is None else comparison.entries[dominator].name,
    )


def _median(samples: Sequence[float]) -> float | None:
    return median(samples) if samples else None
