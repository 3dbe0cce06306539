"""Checks that the engine is exact on a model and a machine: the same requests under many settings
must give the same bits.

Batching, chunks, blocks, shared prefixes, preemption and threads are ways to arrange the same
arithmetic, so none of them may change an answer. A few requests run one at a time, without a cache
and on one thread. Then they run under every setting, and their tokens and logprobs are compared by
`==`, so bit for bit. This is law 1 of docs/design.md, on your own model.

The settings are a base, each factor varied alone, and a few combinations of the hardest values. The
KV cache dtype does change answers, so the settings of each dtype are compared with a plain run in
that dtype. A setting that exists to preempt, to hit the prefix cache or to swap, and did not do so,
counts as a failure too.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from ..engine.admission import Submission
from ..engine.loader import Engine, OpenModel
from ..engine.prompts import TokenizedPrompt
from ..engine_config import EngineConfig
from ..errors import ConfigError
from ..ops.kv_dtypes import KV_GROUP
from ..outputs import LogprobsOnePosition, RequestOutput
from ..sampling_params import SamplingParams
from ..speculative import Speculation
from ..speculative.governor import VerifyAll
from ..speculative.methods import DRAFT

__all__ = ["PLAIN", "SETTINGS", "Outcome", "Probe", "Setting", "Verification", "build_probes"]

MAX_OUTPUT = 24  # tokens
LONGEST_PROMPT = 200
_STAGGER = 3  # steps between two arrivals
_Rows: TypeAlias = Sequence[LogprobsOnePosition | None] | None

TEXT = """A lighthouse keeper once wrote that the sea has no habits, only moods. He kept a book \
in which he noted, every evening, the
colour of the water, the height of the waves and the number of ships that passed, and after \
thirty years he read it from the
first page to the last. He found that no two days had been alike, yet each of them could have \
been foretold from the one
before, if only he had looked at the right things: the wind at noon, the birds, the sound of the \
stones. So he began a second
book. In it he wrote down what he expected the next morning to be, and beside it, a day later, \
what it was. At first he was
wrong as often as a coin would be. Then he learned to leave out what did not matter. The moon \
mattered a little; the ships
did not. In the third winter he was right for forty days in a row, and on the forty-first a storm \
came that he had not seen.
He did not close the book. "What I know of the sea," he wrote, "is a short list of what it \
depends on, and all the rest is
arithmetic." Import sums; check the totals: 12, 48, 7.5 and 1,024 make 1,091.5; def tide(hour): \
return height * cos(hour)."""


@dataclass(frozen=True, slots=True)
class Probe:
    """One request that every setting runs."""

    name: str
    token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run the probes."""

    name: str
    arrivals: Literal["alone", "together", "staggered"] = "together"
    chunk: int = 512  # max_num_batched_tokens
    block_size: int = 16
    threads: int | None = None
    kv_cache_dtype: str = "f16"
    cache: bool = True
    passes: int = 1  # the last one is compared; it hits the prefixes that earlier ones left
    # the KV cache has room for the longest request only
    preemption: Literal["recompute", "swap"] | None = None
    speculative: str | None = None  # all drafts are verified, whether they pay or not


_ITSELF = "itself"  # as `speculative`: the model is its own draft model

PLAIN = Setting(name="one at a time, no cache, 1 thread", arrivals="alone", threads=1, cache=False)
_BASE = (
    Setting(name="together"),
    Setting(name="one at a time", arrivals="alone"),
    Setting(name="staggered", arrivals="staggered"),
    Setting(name="chunks of 64", chunk=64),
    Setting(name="chunks of 16", chunk=16),
    Setting(name="no prefix cache", cache=False),
    Setting(name="a second pass", passes=2),
    Setting(name="1 thread", threads=1),
    Setting(name="2 threads", threads=2),
    Setting(name="blocks of 32", block_size=32),
    Setting(name="blocks of 64", block_size=64),
    Setting(name="preempted, recomputed", chunk=64, preemption="recompute"),
    Setting(name="preempted, swapped", chunk=64, preemption="swap"),
    Setting(name="drafts", speculative="auto"),
    Setting(name="drafts of the model itself", speculative=_ITSELF),
    # the second pass drafts from the answers of the first
    Setting(name="drafts, one at a time, 2 passes", arrivals="alone", speculative="auto", passes=2),
    Setting(
        name="worst: drafts, chunks of 16, staggered, swapped, 2 passes",
        chunk=16,
        arrivals="staggered",
        preemption="swap",
        passes=2,
        speculative="suffix",
    ),
    Setting(
        name="worst: chunks of 16, staggered, swapped, 2 passes",
        chunk=16,
        arrivals="staggered",
        preemption="swap",
        passes=2,
    ),
    Setting(
        name="worst: chunks of 64, recomputed, no cache, 1 thread",
        chunk=64,
        preemption="recompute",
        cache=False,
        threads=1,
    ),
    Setting(
        name="worst: chunks of 16, blocks of 32, swapped, 2 passes",
        chunk=16,
        block_size=32,
        preemption="swap",
        passes=2,
    ),
)
_OF_KV_DTYPE = (
    Setting(name="chunks of 16", chunk=16),
    Setting(name="chunks of 64, recomputed", chunk=64, preemption="recompute"),
    Setting(
        name="chunks of 16, staggered, swapped, 2 passes",
        chunk=16,
        arrivals="staggered",
        preemption="swap",
        passes=2,
    ),
)
SETTINGS = _BASE + tuple(
    replace(setting, name=f"KV in {dtype}: {setting.name}", kv_cache_dtype=dtype)
    for dtype in ("f32", "int8", "int4", "int8,int4")  # the last: keys, values
    for setting in _OF_KV_DTYPE
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one setting."""

    setting: Setting
    num_requests: int
    num_tokens: int  # of the answers
    num_preemptions: int
    num_cached_tokens: int
    num_loaded_blocks: int  # loaded back from the second tier
    num_draft_tokens: int
    num_accepted_tokens: int  # of them
    seconds: float
    difference: str | None  # the first difference; None: identical
    missing: str | None  # the event that the setting is for, if it did not happen

    @property
    def is_proven(self) -> bool:
        """True if the setting did what it is for and changed no bit."""
        return self.difference is None and self.missing is None


class Verification:
    """Runs the probes of a model under settings, and compares them with their plain run.

    `settings` are those that the model can run: int4 needs a head size that is a multiple of
    KV_GROUP.
    """

    def __init__(self, model: OpenModel, isa: str | None = None) -> None:
        self._model = model
        self._isa = isa
        self.probes = build_probes(model)
        self.settings = [
            s
            for s in SETTINGS
            if "int4" not in s.kv_cache_dtype or model.model_config.head_dim % KV_GROUP == 0
        ]
        self.plain_seconds: dict[str, float] = {}  # by KV cache dtype, of plain runs so far
        self._longest = max(len(probe.token_ids) for probe in self.probes) + MAX_OUTPUT
        self._expected: dict[str, list[RequestOutput]] = {}  # by KV cache dtype

    def expected(self, kv_cache_dtype: str) -> list[RequestOutput]:
        """The outputs of the plain run with keys and values in that dtype. The first call runs
        it.
        """
        if kv_cache_dtype not in self._expected:
            outputs, _, seconds = self._run(replace(PLAIN, kv_cache_dtype=kv_cache_dtype))
            self._expected[kv_cache_dtype], self.plain_seconds[kv_cache_dtype] = outputs, seconds
        return self._expected[kv_cache_dtype]

    def run(self, settings: Sequence[Setting] | None = None) -> Iterator[Outcome]:
        """Run these settings, or all, and compare."""
        for setting in self.settings if settings is None else settings:
            expected = self.expected(setting.kv_cache_dtype)
            outputs, engine, seconds = self._run(setting)
            scheduler, stats = engine.core.scheduler, engine.core.stats()
            yield Outcome(
                setting,
                len(outputs),
                sum(
                    len(completion.token_ids) for output in outputs for completion in output.outputs
                ),
                scheduler.num_preemptions,
                scheduler.num_cached_tokens,
                scheduler.kv.num_loaded_blocks,
                stats.num_draft_tokens,
                stats.num_accepted_tokens,
                seconds,
                next(filter(None, map(_difference, self.probes, outputs, expected)), None),
                _missing(setting, engine),
            )

    def _run(self, setting: Setting) -> tuple[list[RequestOutput], Engine, float]:
        engine = self._model.build_engine(self._config(setting))
        if (built := engine.core.speculation) is not None:
            proposers = [
                p for p in built.proposers if p.is_free != (setting.speculative == _ITSELF)
            ]
            engine.core.speculation = Speculation(
                proposers, self._model.model_config.vocab_size, governor=VerifyAll()
            )
        start = time.perf_counter()
        for _ in range(setting.passes):
            outputs = _run_pass(engine, self.probes, setting)
        return outputs, engine, time.perf_counter() - start

    def _config(self, setting: Setting) -> EngineConfig:
        itself = f"{DRAFT}{self._model.path}"
        config = EngineConfig(
            max_model_len=self._longest,
            max_num_batched_tokens=setting.chunk,
            block_size=setting.block_size,
            kv_cache_dtype=setting.kv_cache_dtype,
            enable_prefix_caching=setting.cache,
            preemption=setting.preemption or "recompute",
            speculative=itself if setting.speculative == _ITSELF else setting.speculative,
            backend_options={"threads": setting.threads, "isa": self._isa},
        )
        layout = self._model.layout(config)
        blocks = layout.blocks_for(self._longest, setting.chunk) * (
            1 if setting.preemption else 2 * len(self.probes)
        )
        return replace(
            config,
            kv_cache_memory=blocks * layout.bytes_per_block,
            swap_space=64 * blocks * layout.bytes_per_block / (1 << 30),
        )


def build_probes(model: OpenModel) -> list[Probe]:
    """Prompts with and without shared prefixes, of 5 to 200 tokens or as many as the context holds;
    greedy, and sampled in many ways.
    """
    longest = min(LONGEST_PROMPT, model.model_config.max_position_embeddings - MAX_OUTPUT)
    if longest < 64:
        raise ConfigError(
            f"the model was made for {model.model_config.max_position_embeddings} tokens; to "
            f"verify it takes at least {64 + MAX_OUTPUT}"
        )
    # two texts, from which all prompts are cut
    tokens = model.tokenizer.encode(TEXT)
    tokens = tokens * (1 + 2 * longest // len(tokens))
    text, other = tokens[:longest], tokens[longest : 2 * longest]

    def probe(name: str, token_ids: list[int], **params: object) -> Probe:
        shape = SamplingParams(
            max_tokens=MAX_OUTPUT,
            logprobs=3,
            ignore_eos=True,
            seed=len(token_ids),
            **params,  # type: ignore[arg-type]
        )
        return Probe(f"{name}, {len(token_ids)} tokens", token_ids, shape)

    # the probes
    half = longest // 2
    return [
        probe("greedy", text, temperature=0),
        probe("greedy, short", text[:5], temperature=0),
        probe(
            "drawn, with a shared prefix",
            text[: half + 20] + other[:9],
            temperature=1.0,
            top_p=0.95,
        ),
        probe("drawn, a prefix of another", text[:half], temperature=1.2),
        probe(
            "greedy, with penalties",
            other[:33],
            temperature=0,
            repetition_penalty=1.1,
            presence_penalty=0.3,
        ),
        probe("drawn twice", other[:48], temperature=0.9, top_k=40, n=2),
        probe("greedy, prompt scored", text[:30] + other[:17], temperature=0, prompt_logprobs=2),
        probe("drawn, the same prompt", text, temperature=0.8, min_p=0.02),
    ]


def _run_pass(engine: Engine, probes: Sequence[Probe], setting: Setting) -> list[RequestOutput]:
    core = engine.core
    done: dict[str, RequestOutput] = {}
    # steps before the next probe arrives; None: until all have finished
    most_steps = {"alone": None, "together": 0, "staggered": _STAGGER}[setting.arrivals]

    def step(most: int | None) -> None:
        while core.has_unfinished and most != 0:
            done.update((output.request_id, output) for output in core.step() if output.finished)
            most = None if most is None else most - 1

    for i, probe in enumerate(probes):
        prompt = TokenizedPrompt(probe.token_ids, None)
        core.add_requests([Submission(str(i), prompt, replace(probe.params))])
        step(most_steps)
    step(None)
    return [done[str(i)] for i in range(len(probes))]


def _missing(setting: Setting, engine: Engine) -> str | None:
    scheduler = engine.core.scheduler
    resumed = {
        request_id
        for event in scheduler.events
        if event.kind == "resume"
        for request_id in event.request_ids
    }
    preempted = {
        request_id
        for event in scheduler.events
        if event.kind == "preempt"
        for request_id in event.request_ids
    }
    if setting.preemption and not (scheduler.num_preemptions and resumed == preempted):
        return "nobody was preempted"
    if setting.preemption == "swap" and not scheduler.kv.num_loaded_blocks:
        return "nothing was swapped"
    if setting.cache and not scheduler.num_cached_tokens:
        return "no prefix was hit"
    if setting.speculative and not engine.core.stats().num_draft_tokens:
        return "nothing was drafted"
    return None


def _difference(probe: Probe, found: RequestOutput, expected: RequestOutput) -> str | None:
    """The first difference, in words; None if there is none."""
    # what is compared: the prompt, and each completion
    rows: list[tuple[str, list[int], _Rows, list[int], _Rows]] = [
        (
            "prompt",
            expected.prompt_token_ids,
            expected.prompt_logprobs,
            found.prompt_token_ids,
            found.prompt_logprobs,
        )
    ]
    rows += [
        ("output", e.token_ids, e.logprobs, f.token_ids, f.logprobs)
        for e, f in zip(expected.outputs, found.outputs, strict=True)
    ]
    # token by token, then the lengths
    for part, tokens, logprobs, found_tokens, found_logprobs in rows:
        for i, (token, found_token) in enumerate(zip(tokens, found_tokens, strict=False)):
            if token != found_token:
                return f"{probe.name}: {part} token {i} is {found_token}, not {token}"
            row = _row_difference((logprobs or [])[i : i + 1], (found_logprobs or [])[i : i + 1])
            if row is not None:
                return f"{probe.name}: {part} token {i}: {row}"
        if len(tokens) != len(found_tokens) or len(logprobs or []) != len(found_logprobs or []):
            return f"{probe.name}: {len(found_tokens)} {part} tokens, not {len(tokens)}"
    return None


def _row_difference(
    expected: Sequence[LogprobsOnePosition | None], found: Sequence[LogprobsOnePosition | None]
) -> str | None:
    for row, found_row in zip(expected, found, strict=False):
        if (row is None) != (found_row is None):
            return f"logprobs are {'missing' if found_row is None else 'there, and should not be'}"
        for token, logprob in (row or {}).items():
            other = (found_row or {}).get(token)
            if other is None:
                return f"candidate {token} is missing"
            if (other.logprob, other.rank) != (logprob.logprob, logprob.rank):
                return f"the logprob of {token} is {other.logprob!r}, not {logprob.logprob!r}"
    return None
