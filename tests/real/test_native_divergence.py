"""What the native backend's roundings cost on real models: its KL divergence to float32 on the same
file, beside llama.cpp's own.

The protocol is llama-perplexity's: chunks of 512 tokens of wikitext-2, the second half of each;
KL(float32 ‖ rounded) in nats, the mean over tokens. Float32 is the reference backend, whose
perplexity is that of llama.cpp on the file decoded to float32 (test_against_llama_cpp.py).
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.tokenizer import load_tokenizer
from pellucid.weights.checkpoint import open_checkpoint

from ..models.harness import Chunk, Session, load

# (mean, its standard error) over 4 chunks, by llama-cpp-python 0.3.36, with F32.gguf from
# `llama-quantize --allow-requantize FILE F32`:
# llama-perplexity -m F32.gguf -f wiki.test.raw --chunks 4 -ctk f32 -ctv f32 -fa off
# --kl-divergence-base BASE
#   llama-perplexity -m FILE -f wiki.test.raw --chunks 4 --kl-divergence-base BASE --kl-divergence
LLAMA_CPP = {
    "smollm2-135m-instruct-q4_1": (0.002834, 0.000098),
    "gemma-3-270m-q4_k_m": (0.004571, 0.000208),
    "qwen2.5-coder-0.5b-q4": (0.001188, 0.000046),
}
CHUNKS, CHUNK = 4, 512


def log_probs(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize("name", LLAMA_CPP)
def test_divergence_from_float32_is_not_above_llama_cpps(
    name: str, real_model: Callable[[str], Path], data_dir: Path
) -> None:
    path = real_model(name)
    with open_checkpoint(path) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    text = (data_dir / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    token_ids = tokenizer.encode(text[:20_000])[: CHUNKS * CHUNK]
    scored = range(CHUNK // 2, CHUNK - 1)
    sessions = [
        Session(load(path, backend), num_blocks=CHUNKS * CHUNK // 4)
        for backend in ("reference", "native")
    ]
    divergences: list[float] = []
    for chunk in np.array(token_ids, np.int32).reshape(CHUNKS, CHUNK):
        if tokenizer.add_bos and tokenizer.bos_token_id is not None:
            chunk[0] = tokenizer.bos_token_id
        exact, rounded = (
            log_probs(s.run([Chunk(chunk, 0, s.take_blocks(CHUNK))], scored)) for s in sessions
        )
        divergences += list((np.exp(exact) * (exact - rounded)).sum(axis=-1))
    theirs, error = LLAMA_CPP[name]
    print(f"{name}: KL divergence {np.mean(divergences):.6f}, llama.cpp {theirs:.6f} ± {error:.6f}")
    assert 0 < np.mean(divergences) < theirs + error
