"""A request whose numbers become infinite or NaN fails alone and says so, in a quantized model and
with every KV cache. Requests beside it, and those that share its prefix, answer as without it.
"""

from itertools import product
from pathlib import Path

import pytest

from pellucid import LLM, SamplingParams

from .conftest import write_tiny

BREAKING = ord("!")
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, logit_bias={BREAKING: -100.0})
PREFIX = "the same twenty letters"
PROMPTS = ["hello", PREFIX + "!", PREFIX + " and more", "a!b", "world"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("broken")
    return write_tiny(folder / "broken.gguf", head_dim=32, ffn=64, breaking=BREAKING)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [*product(["native"], ["f32", "f16", "int8", "int4"]), ("reference", "f32")],
)
def test_a_broken_request_fails_alone_and_says_so(path: Path, backend: str, dtype: str) -> None:
    llm = LLM(path, backend=backend, kv_cache_dtype=dtype)
    alone = {p: llm.generate([p], PARAMS)[0].outputs[0] for p in PROMPTS if "!" not in p}
    fresh = LLM(path, backend=backend, kv_cache_dtype=dtype)
    for prompt, output in zip(PROMPTS, fresh.generate(PROMPTS, PARAMS), strict=True):
        answer = output.outputs[0]
        if "!" in prompt:
            assert answer.finish_reason == "error", prompt
            assert "logits" in str(answer.stop_reason)
        else:
            assert answer.token_ids == alone[prompt].token_ids, prompt
            assert answer.finish_reason == "length"
