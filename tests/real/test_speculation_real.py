"""Drafts change no bit of a real model: greedy, drawn, penalized, scored and constrained requests
together, by each kind of proposer, with little memory and small chunks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="constrained output needs the extra 'structured'")

from pellucid import LLM, RequestOutput, SamplingParams, StructuredOutputsParams
from pellucid.engine.core import EngineCore
from pellucid.speculative import Speculation
from pellucid.speculative.governor import VerifyAll

CODE = """def area(width, height):
    return width * height

def volume(width, height, depth):
    return width * height * depth

def area(width, height):
"""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
MOST: dict[str, Any] = {"max_tokens": 20, "ignore_eos": True}
REQUESTS = [
    (CODE, SamplingParams(temperature=0, logprobs=2, **MOST)),
    (CODE, SamplingParams(temperature=0.7, seed=1, top_p=0.9, logprobs=0, n=2, **MOST)),
    ("The sea, the sea, the sea, the", SamplingParams(temperature=0, prompt_logprobs=1, **MOST)),
    (
        "One, two, three, one, two, three, one,",
        SamplingParams(temperature=0.5, seed=2, repetition_penalty=1.05, min_p=0.05, **MOST),
    ),
    (
        'People: {"name": "Ada", "age": 36}, {"name": "Bo", "age": 41}, ',
        SamplingParams(
            temperature=0, max_tokens=24, structured_outputs=StructuredOutputsParams(json=SCHEMA)
        ),
    ),
]


def answers(llm: LLM) -> list[RequestOutput]:
    return llm.generate(
        [prompt for prompt, _ in REQUESTS], [params for _, params in REQUESTS], use_tqdm=False
    )


def verify_all(llm: LLM) -> None:
    """Verify every draft, whether it pays or not."""

    def change(core: EngineCore) -> None:
        assert core.speculation is not None
        core.speculation = Speculation(
            core.speculation.proposers, llm.model_config.vocab_size, governor=VerifyAll()
        )

    llm._thread.call(change)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct-q4_1", "qwen2.5-coder-0.5b-q4"])
def test_drafts_change_no_bit(real_model: Callable[[str], Path], name: str) -> None:
    path = real_model(name)
    options: dict[str, Any] = {"max_model_len": 160, "kv_cache_memory": 1 << 25}
    with LLM(path, max_num_seqs=1, enable_prefix_caching=False, speculative=None, **options) as llm:
        expected = answers(llm)
    for proposer, more in (
        ("ngram", {"max_num_batched_tokens": 64}),
        ("suffix", {"max_num_seqs": 3, "preemption": "swap"}),
        (f"draft:{path}", {}),
    ):
        with LLM(path, speculative=proposer, **(options | more)) as llm:
            verify_all(llm)
            found = answers(llm)
            stats = llm.stats()
        for output, right in zip(found, expected, strict=True):
            assert output.outputs == right.outputs, proposer
            assert output.prompt_logprobs == right.prompt_logprobs, proposer
        assert 0 < stats.num_accepted_tokens <= stats.num_draft_tokens, proposer
