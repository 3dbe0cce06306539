"""The engine on the native backend: the same tokens and the same logprobs, bit for bit, on any
number of threads and in any chunks.
"""

from pathlib import Path

import pytest

from pellucid import LLM, SamplingParams
from pellucid.outputs import RequestOutput

PROMPTS = ["The capital", "A", "of France is a town that one cannot see from here"]
PARAMS = SamplingParams(
    temperature=1.3, seed=4, max_tokens=20, logprobs=3, prompt_logprobs=2, ignore_eos=True
)


def facts(output: RequestOutput) -> object:
    """Everything of an answer that comes from numbers: floats are compared by `==`, so to the
    bit.
    """
    completion = output.outputs[0]
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    rows = [*completion.logprobs, *(row for row in output.prompt_logprobs if row is not None)]
    return completion.token_ids, [{token: x.logprob for token, x in row.items()} for row in rows]


@pytest.fixture(scope="module", params=["f16", "int8"])
def kv_cache_dtype(request: pytest.FixtureRequest) -> str:
    """The default, and one that rounds."""
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def measure(tiny_path: Path, kv_cache_dtype: str) -> list[object]:
    """Each prompt alone, on one thread, in one chunk."""
    llm = LLM(tiny_path, backend="native", threads=1, kv_cache_dtype=kv_cache_dtype)
    return [facts(llm.generate([prompt], PARAMS, use_tqdm=False)[0]) for prompt in PROMPTS]


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("budget", [1, 3, 16, 512])
def test_answers_are_the_same_bits_on_any_number_of_threads_and_in_any_chunks(
    tiny_path: Path, kv_cache_dtype: str, measure: list[object], threads: int, budget: int
) -> None:
    llm = LLM(
        tiny_path,
        backend="native",
        threads=threads,
        max_num_batched_tokens=budget,
        kv_cache_dtype=kv_cache_dtype,
    )
    assert [facts(output) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == measure
