"""Bit equality with and without drafts: proposers, parameters, batches, memory, caches, chunks, KV
dtypes, windows and quantized weights, in a pairwise design.

`FACTORS` and `KINDS` are the whole matrix: a new proposer or dtype is one more entry.

Each run has one request of each kind of `KINDS` or more, so they meet in its batches too. Every
draft is verified, whether it pays or not. Tokens, texts, logprobs, finish and stop reasons are
compared by `==`. In a run that drafted nothing, and for a proposer whose drafts were never accepted
or never rejected, nothing was shown, so that fails too.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="constrained output needs the extra 'structured'")

from pellucid import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import open_model
from pellucid.engine.options import build_engine_config
from pellucid.speculative import Speculation
from pellucid.speculative.governor import VerifyAll

from .conftest import write_tiny
from .covering import pairwise

MAX_MODEL_LEN = 96
HEAD_DIM = 32  # the least that int4 takes
SCHEMA = {
    "type": "object",
    "properties": {"ab": {"enum": ["abab", "ba"]}, "n": {"type": "integer", "maximum": 99}},
    "required": ["ab", "n"],
    "additionalProperties": False,
}


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 24, "temperature": 0.0, "seed": 1} | fields))


def constrained(**fields: Any) -> SamplingParams:
    return params(structured_outputs=StructuredOutputsParams(**fields), temperature=0.8)


KINDS = {
    "greedy": params(ignore_eos=True, logprobs=2),
    "sampled": params(temperature=0.7, top_p=0.9, top_k=20, logprobs=0),
    "min-p, typical": params(temperature=1.3, min_p=0.02, typical_p=0.95, logprobs=5),
    "cold": params(temperature=0.2, seed=5, ignore_eos=True),
    "penalties": params(
        repetition_penalty=1.1, presence_penalty=0.4, frequency_penalty=0.2, logprobs=1
    ),
    "rewards": params(frequency_penalty=-0.5, temperature=0.5, ignore_eos=True),
    "bias": params(logit_bias={97: 6.0, 98: 6.0}, temperature=0.9, logprobs=1),
    "allowed": params(allowed_token_ids=[97, 98, 99, 257], temperature=1.0, min_tokens=9),
    "bans": params(bad_words=["ab", "ca", "cc"], allowed_token_ids=[97, 98, 99], logprobs=1),
    "min tokens": params(min_tokens=12, logit_bias={257: 8.0, 97: 7.0}, temperature=0.7),
    "prompt scored": params(prompt_logprobs=2, logprobs=1, ignore_eos=True),
    "all logprobs": params(logprobs=-1, max_tokens=10, ignore_eos=True),
    "stop strings": params(
        allowed_token_ids=[97, 98, 99], temperature=1.0, stop=["abca", "bbb", "cac"], seed=3
    ),
    "stop string kept": params(
        logit_bias={97: 9.0, 98: 9.0}, temperature=1.0, stop=["abb"], seed=4,
        include_stop_str_in_output=True,
    ),
    "stop ids": params(
        allowed_token_ids=[97, 98, 99], temperature=1.0, stop_token_ids=[99], min_tokens=4
    ),
    "several": params(n=3, temperature=0.9, logprobs=1, ignore_eos=True),
    "no text": params(detokenize=False, ignore_eos=True),
    "json": constrained(json=SCHEMA),
    "regex": constrained(regex="(ab|cd)+x"),
    "choice": constrained(choice=["ababababab", "abababac", "b"]),
    "grammar": constrained(grammar='root ::= "[" item ("," item)* "]"\nitem ::= "ab" | "cab"'),
}  # fmt: skip
PROMPTS = ["abcabcabcabc", "the quick brown fox", '{"ab":"abab","n":1}{"ab":"ab', "[ab,cab,ab,cab]"]

FACTORS: dict[str, Sequence[object]] = {
    "proposer": ["ngram", "suffix", "auto", "draft"],
    "batch": [1, 4, 32],
    "memory": ["ample", "recompute", "swap"],
    "cache": [True, False],
    "chunk": [512, 24],
    "k": [None, 1, 4],
    "kv": ["f32", "f16", "int8", "int4", "f16,int8", "int8,int4"],
    "model": ["llama", "gemma3"],
    "weights": [None, "q8_0", "int8", "w8a8", "q4_0", "iq4_nl"],
    "threads": [1, 2],
}
ROWS = pairwise(FACTORS)
NUM_FAST = 8  # the others are slow tests


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two tiny models, one of them with sliding windows, and a draft model of one layer."""
    folder = tmp_path_factory.mktemp("matrix")
    return {
        "llama": write_tiny(folder / "llama.gguf", head_dim=HEAD_DIM),
        "gemma3": write_tiny(
            folder / "gemma3.gguf", "gemma3", windows=[16, 0, 16], head_dim=HEAD_DIM
        ),
        "draft": write_tiny(folder / "draft.gguf", windows=[0], head_dim=HEAD_DIM),
    }


def verify_all(llm: LLM, k: int | None) -> None:
    """Verify every draft, whether it pays or not."""

    def change(core: EngineCore) -> None:
        assert core.speculation is not None
        core.speculation = Speculation(
            core.speculation.proposers,
            llm.model_config.vocab_size,
            num_speculative_tokens=k,
            governor=VerifyAll(),
        )

    llm._thread.call(change)


def kv_bytes(path: Path, options: dict[str, Any]) -> int:
    """KV memory for one request of the longest length."""
    config = build_engine_config(options)
    with open_model(path) as model:
        layout = model.layout(config)
    return layout.bytes_per_block * layout.blocks_for(MAX_MODEL_LEN, config.max_num_batched_tokens)


def answers(llm: LLM, num_each: int) -> list[RequestOutput]:
    """Each kind `num_each` times, over the prompts."""
    asked = [
        (PROMPTS[(i + j) % len(PROMPTS)], replace(shape, seed=(shape.seed or 0) + 10 * j))
        for j in range(num_each)
        for i, shape in enumerate(KINDS.values())
    ]
    return llm.generate([p for p, _ in asked], [s for _, s in asked], use_tqdm=False)


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> Iterator[Any]:
    """The answers without drafts, one at a time."""
    found: dict[tuple[object, ...], list[RequestOutput]] = {}

    def find(row: dict[str, Any], num_each: int) -> list[RequestOutput]:
        key = row["model"], row["kv"], row["weights"], num_each
        if key not in found:
            with LLM(
                models[row["model"]],
                max_model_len=MAX_MODEL_LEN,
                max_num_seqs=1,
                kv_cache_dtype=row["kv"],
                quantization=row["weights"],
                enable_prefix_caching=False,
                speculative=None,
                threads=1,
            ) as llm:
                found[key] = answers(llm, num_each)
        return found[key]

    yield find


TALLY: Counter[tuple[str, bool]] = Counter()  # (proposer, was it accepted) -> tokens


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, marks=[pytest.mark.slow] * (i >= NUM_FAST), id=str(i))
        for i, row in enumerate(ROWS)
    ],
)
def test_drafts_change_no_bit(models: dict[str, Path], plain: Any, row: dict[str, Any]) -> None:
    proposer, path = row["proposer"], models[row["model"]]
    options = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": row["batch"],
        "max_num_batched_tokens": row["chunk"],
        "kv_cache_dtype": row["kv"],
        "quantization": row["weights"],
        "enable_prefix_caching": row["cache"],
        "preemption": "swap" if row["memory"] == "swap" else "recompute",
        "speculative": f"draft:{models['draft']}" if proposer == "draft" else proposer,
        "num_speculative_tokens": row["k"],
        "threads": row["threads"],
    }
    is_tight = row["memory"] != "ample"
    options["kv_cache_memory"] = kv_bytes(path, options) * 2 if is_tight else 1 << 24
    with LLM(path, **options) as llm:
        verify_all(llm, row["k"])
        num_each = 2 if row["batch"] == 32 else 1
        found = answers(llm, num_each)
        stats = llm.stats()
    expected = plain(row, num_each)
    for kind, right, output in zip(list(KINDS) * num_each, expected, found, strict=True):
        assert output.outputs == right.outputs, kind
        assert output.prompt_logprobs == right.prompt_logprobs, kind
    # The run must have done what it is for.
    assert stats.num_draft_tokens > 0
    if is_tight and row["batch"] == 32:
        assert stats.num_preemptions > 0
    TALLY[proposer, True] += stats.num_accepted_tokens
    TALLY[proposer, False] += stats.num_draft_tokens - stats.num_accepted_tokens


def test_drafts_were_accepted_and_rejected() -> None:
    """By each proposer that the tests before this one ran."""
    ran = {proposer for proposer, _ in TALLY}
    if not ran:
        pytest.skip("the tests before this one were not run")
    assert all(TALLY[proposer, kind] > 50 for proposer in ran for kind in (True, False)), TALLY
