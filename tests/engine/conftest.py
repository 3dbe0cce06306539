"""A tiny model that the engine tests run whole: a random two-layer Llama with a byte-level vocabulary and a chat template."""

from pathlib import Path

import numpy as np
import pytest

from pellucid import LLM
from pellucid.formats import encode_dense
from pellucid.weights.gguf_writer import write_gguf

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, CONTEXT = 32, 4, 2, 48, 2, 96
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    shifted = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(shifted)) for b in range(256)]


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the file. Token id = byte value for the first 256; the special tokens follow."""
    tokens = [*_byte_tokens(), *SPECIAL, "th"]
    rng = np.random.default_rng(0)
    d = HIDDEN // HEADS

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 2 / shape[-1] ** 0.5, shape).astype(np.float32)

    arrays = {"token_embd.weight": random(len(tokens), HIDDEN), "output_norm.weight": np.ones(HIDDEN, np.float32)}
    for i in range(LAYERS):
        arrays |= {
            f"blk.{i}.attn_norm.weight": np.ones(HIDDEN, np.float32),
            f"blk.{i}.ffn_norm.weight": np.ones(HIDDEN, np.float32),
            f"blk.{i}.attn_q.weight": random(HEADS * d, HIDDEN),
            f"blk.{i}.attn_k.weight": random(KV_HEADS * d, HIDDEN),
            f"blk.{i}.attn_v.weight": random(KV_HEADS * d, HIDDEN),
            f"blk.{i}.attn_output.weight": random(HIDDEN, HEADS * d),
            f"blk.{i}.ffn_gate.weight": random(FFN, HIDDEN),
            f"blk.{i}.ffn_up.weight": random(FFN, HIDDEN),
            f"blk.{i}.ffn_down.weight": random(HIDDEN, FFN),
        }
    metadata = {
        "general.architecture": "llama",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": d,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [*[1] * 256, *[3] * len(SPECIAL), 1],  # 1: normal, 3: control
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_gguf(path, metadata, ((name, encode_dense(array)) for name, array in arrays.items()))
    return path


@pytest.fixture(scope="session", params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn: what the engine promises does not depend on it."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny(tiny_path: Path, backend: str) -> LLM:
    """The model, loaded once; each test leaves nothing in its queue."""
    return LLM(tiny_path, backend=backend)
