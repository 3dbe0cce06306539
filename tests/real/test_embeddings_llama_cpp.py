"""Embeddings of real models beside those of llama.cpp's llama-embedding, on the same files.

Both engines round activations to 8 bits before products with quantized weights, each in its own
way; the reference backend does not. The vectors have the length 1, so their product is the cosine
of their angle. It was 0.9988 at least, and 0.9995 between the two backends. A wrong token, layer,
norm or pooling gives less than 0.9.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid import LLM, PoolingParams

GOLDEN = json.loads(
    (Path(__file__).parent.parent / "golden" / "llama_cpp" / "embeddings.json").read_text("utf-8")
)
LEAST = 0.997  # cosine


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", GOLDEN["embeddings"])
def test_embeddings_point_where_llama_cpps_do(
    real_model: Callable[[str], Path], name: str, backend: str
) -> None:
    path = real_model(name.removesuffix(".gguf"))
    poolings: dict[str, Any] = GOLDEN["embeddings"][name]
    with LLM(path, backend=backend, max_model_len=256) as llm:
        for pooling, expected in poolings.items():
            (found,) = llm.embed(GOLDEN["text"], PoolingParams(pooling=pooling))  # type: ignore[arg-type]
            assert np.dot(found.outputs.embedding, expected) > LEAST
            assert np.dot(poolings["last"], poolings["mean"]) < 0.9


@pytest.mark.parametrize("name", GOLDEN["embeddings"])
def test_a_real_embedding_has_the_same_bits_whatever_runs_beside_it(
    real_model: Callable[[str], Path], name: str
) -> None:
    path = real_model(name.removesuffix(".gguf"))
    text = GOLDEN["text"]
    params = [PoolingParams(pooling="last"), PoolingParams(pooling="mean")]
    with LLM(path, max_model_len=256) as llm:
        alone = [llm.embed(text, p)[0].outputs.embedding for p in params]
    options: dict[str, Any] = {"max_num_batched_tokens": 13, "enable_prefix_caching": False}
    with LLM(path, max_model_len=256, threads=1, **options) as llm:
        beside = llm.embed(
            ["Another one.", text, text, "and more"], [params[1], *params, params[0]]
        )
    assert [output.outputs.embedding for output in beside[1:3]] == alone
