"""Several models beside a base, over the same tokens of a text: size, perplexity, and how far the
predictions of each are from the base's.

All models run through the text together, chunk by chunk, so that a run that is interrupted has the
same tokens of each. The base's logits are computed once per step, in float32, and are compared with
every model's; nothing is kept on disk. Models that do not fit in memory together form groups, and
the base runs again for each group. So memory holds the base, one group, and the logits of a step of
two models.

The **noise floor** is the divergence of the base from itself with other arithmetic: the same file
on the other backend (native and reference, each with its default KV cache). Those two runs differ
by rounding alone, so a divergence of that size says nothing about a model. Another instruction set
would not do: the native backend gives the same bits on all of them, and its floor would be 0. Nor
would another KV cache dtype alone, because that is one of the choices that are compared.

The floor is measured on the first chunks only, because the reference backend is slow.
"""

import gc
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..engine.loader import OpenModel, open_model
from ..engine_config import EngineConfig
from ..errors import CapacityError
from ..formats import packed_bytes
from ..host_memory import available_memory
from ..weights.checkpoint import Checkpoint, open_checkpoint
from .bench_model import file_bytes
from .divergence import (
    BaseRows,
    Divergence,
    DivergenceMeter,
    LiveBase,
    ReadPart,
    base_rows,
    measure_divergence,
)
from .evaluation import check_same_tokens
from .perplexity import PROTOCOLS, Estimate, cut_windows, mean_estimate
from .scoring import ScoredRows, Scorer, Windows, check_context

__all__ = ["Comparison", "Entry", "Facts", "open_comparison"]

FLOOR_CHUNKS = 4
RESERVE_BYTES = 1 << 30  # memory that stays free when a group is filled
OTHER_BACKEND = {"native": "reference", "reference": "native"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A model to compare, and how it is run."""

    name: str  # as it is shown
    path: Path
    config: EngineConfig


@dataclass(frozen=True, slots=True)
class Facts:
    """What the headers say."""

    file_bytes: int
    bits_per_weight: float  # of the tensors, with their scales
    kv_bytes: int  # per token
    kv_dtypes: str  # of keys and of values, or of both: "f16", "int8,int4"
    max_context: int  # tokens


class Comparison:
    """A run that is ready to start, and its results so far. The first entry is the base."""

    def __init__(self, entries: Sequence[Entry], facts: Sequence[Facts], windows: Windows) -> None:
        self.entries, self.facts, self.windows = entries, facts, windows
        self.floor: Divergence | None = None
        self.floor_obstacle: str | None = None  # why there is no floor
        self.groups: list[list[int]] = []  # entries that ran together, beside the base
        self._meters: dict[int, DivergenceMeter] = {}

    def run(self) -> Iterator[tuple[int, int]]:
        """Measure. Yields (chunks done, chunks in all) over the floor and all groups known so far.
        Raises CapacityError if a model does not fit beside the base, and RequestError for a logit
        that is not finite.
        """
        others = range(1, len(self.entries))
        with open_model(self.entries[0].path) as base_model:
            scorer = Scorer(base_model, self.entries[0].config, self.windows.n_ctx)
            # the noise floor
            done = 0
            for done in self._run_floor(scorer):
                yield done, done + len(self.windows)
            gc.collect()  # engines refer to themselves
            # groups of models that fit beside the base
            while others:
                with ExitStack() as group_stack:
                    group = self._load_group(group_stack, base_model, others)
                    others = others[len(group) :]
                    for complete in self._run_group(scorer, group):
                        yield done + complete, done + len(self.windows) * (2 if others else 1)
                done += len(self.windows)
                del group
                gc.collect()

    def num_chunks(self, i: int) -> int:
        """The chunks on which an entry has been compared so far; the base with the first one."""
        group = next((group for group in self.groups if i in group or i == 0), [])
        return min((self._meters[k].num_windows for k in group), default=0)

    def result(self, i: int) -> Divergence | None:
        """The result of an entry so far; None for the base, and if there is none yet."""
        count = self.num_chunks(i)
        return self._meters[i].result(count) if i and count else None

    @property
    def is_comparable(self) -> bool:
        """Whether all models were compared with the base on the same chunks."""
        counts = {self.num_chunks(i) for i in range(len(self.entries))}
        return len(counts) == 1 and 0 not in counts

    def difference(self, i: int, j: int) -> Estimate:
        """KL of entry i minus KL of entry j, over the same tokens. Its error counts chunks rather
        than tokens if that gives a larger one: the tokens of a chunk are not independent samples.
        """
        count = self.num_chunks(i)
        values = np.zeros(count * self.windows.rows_per_window)
        for entry, sign in ((i, 1), (j, -1)):
            if entry:
                values += sign * self._meters[entry].kl(count)
        each = mean_estimate(values)
        by_chunk = mean_estimate(values.reshape(count, -1).mean(axis=1))
        return Estimate(each.value, max(each.error, by_chunk.error))

    def loses_less(self, i: int, j: int) -> bool:
        """Whether entry i has less divergence than entry j, by more than two standard errors of
        the difference, and not both lie within the noise floor.
        """
        found = self.difference(i, j)
        if found.value >= -2 * found.error:
            return False
        larger = self.result(j)
        limit = self.noise_limit
        return limit is None or larger is None or larger.kl.value > limit

    @property
    def noise_limit(self) -> float | None:
        """A mean divergence of at most this much is within the noise floor."""
        return None if self.floor is None else self.floor.kl.value + 2 * self.floor.kl.error

    def _run_floor(self, scorer: Scorer) -> Iterator[int]:
        """Measure the base beside itself on the other backend. Yields the chunks done."""
        base = self.entries[0]
        config = replace(
            base.config, backend=OTHER_BACKEND[base.config.backend], backend_options={}
        )
        windows = self.windows.begin(FLOOR_CHUNKS)
        try:
            with open_model(base.path) as model:
                other = Scorer(model, config, windows.n_ctx)
                for self.floor in measure_divergence(other, windows, LiveBase(scorer, windows)):
                    yield self.floor.model.num_chunks
        except CapacityError as error:
            self.floor_obstacle = str(error)

    def _load_group(
        self, stack: ExitStack, base: OpenModel, others: Sequence[int]
    ) -> list[tuple[int, Scorer]]:
        """Load as many of the entries, in order, as fit. Entries of one file share its weights."""
        models = {base.path: base}
        group: list[tuple[int, Scorer]] = []
        for i in others:
            entry = self.entries[i]
            if group and available_memory() < RESERVE_BYTES:
                break
            if entry.path not in models:
                models[entry.path] = stack.enter_context(open_model(entry.path))
            try:
                scorer = Scorer(models[entry.path], entry.config, self.windows.n_ctx)
            except CapacityError:
                if not group:
                    raise
                break
            group.append((i, scorer))
        return group

    def _run_group(self, base: Scorer, group: Sequence[tuple[int, Scorer]]) -> Iterator[int]:
        """Run the base and the group through the text, step by step. Yields the chunks done."""
        self.groups.append([i for i, _ in group])
        for i, _ in group:
            self._meters[i] = DivergenceMeter(self.windows.rows_per_window)
        steps = {i: scorer.run(self.windows) for i, scorer in group}
        with ThreadPoolExecutor() as pool:
            for rows in base.run(self.windows):
                read = _read_rows(rows, pool)
                for i, step in steps.items():
                    self._meters[i].add(next(step), read, pool)
                if rows.num_windows:
                    yield self.num_chunks(group[0][0])


def _read_rows(rows: ScoredRows, pool: ThreadPoolExecutor) -> ReadPart:
    """The predictions of a step of the base, computed once for all models."""

    def read(part: slice) -> BaseRows:
        return base_rows(rows.logits[part], rows.targets[part])

    parts = list(rows.parts())
    found = dict(zip((part.start for part in parts), pool.map(read, parts), strict=True))
    return lambda part: found[part.start]


def open_comparison(
    entries: Sequence[Entry], text: str, *, n_ctx: int | None = None, chunks: int | None = None
) -> Comparison:
    """Read the headers and tokenizers of all models, and cut the text by the protocol of
    llama-perplexity. The first entry is the base.

    Raises a PellucidError with one sentence if a model cannot be run, or if the models do not cut
    the text into the same tokens. No weights are read.
    """
    protocol = PROTOCOLS["llama.cpp"]
    n_ctx = n_ctx or protocol.default_n_ctx
    facts: list[Facts] = []
    base_entry = entries[0]
    with open_model(base_entry.path) as base:
        windows = cut_windows(base.tokenizer, text, protocol, n_ctx, chunks)
        for entry in entries:
            with open_checkpoint(entry.path) as checkpoint:
                model = OpenModel(entry.path, checkpoint)
                check_context(model, entry.config, n_ctx)
                if entry.path != base_entry.path:
                    own = cut_windows(model.tokenizer, text, protocol, n_ctx, chunks)
                    check_same_tokens(model, own, base, windows)
                facts.append(_facts(entry, model, checkpoint))
    return Comparison(entries, facts, windows)


def _facts(entry: Entry, model: OpenModel, checkpoint: Checkpoint) -> Facts:
    """Raises ConfigError if the backend has no such KV cache."""
    layout, specs = model.layout(entry.config), checkpoint.specs().values()
    kv_dtypes = [layout.specs[0].k_dtype, layout.specs[0].v_dtype]
    size = file_bytes(entry.path)
    tensor_bytes = sum(map(packed_bytes, specs)) if entry.path.is_file() else size
    return Facts(
        file_bytes=size,
        bits_per_weight=8 * tensor_bytes / sum(math.prod(spec.shape) for spec in specs),
        kv_bytes=layout.bytes_per_token,
        kv_dtypes=",".join(dict.fromkeys(kv_dtypes)),
        max_context=model.model_config.max_position_embeddings,
    )
