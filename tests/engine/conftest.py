"""A tiny model that the engine tests run whole: a random two-layer Llama with a byte-level
vocabulary and a chat template.
"""

import gc
import logging
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from pellucid import LLM
from pellucid.formats import encode_dense, quantize
from pellucid.formats.tensor import HostTensor
from pellucid.weights.gguf_writer import write_gguf

HIDDEN, HEADS, KV_HEADS, FFN, LAYERS, CONTEXT = 32, 4, 2, 48, 2, 96
SPECIAL = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    shifted = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(shifted)) for b in range(256)]


def write_tiny(
    path: Path,
    architecture: str = "llama",
    context: int = CONTEXT,
    windows: Sequence[int] = (),
    head_dim: int = HIDDEN // HEADS,
    ends: bool = True,
    ffn: int = FFN,
    add_bos: bool = False,
    breaking: int | None = None,
    padding: int = 0,
    merge: str = "th",
) -> Path:
    """A tiny random model. Token id = byte value for the first 256; the special tokens follow.

    `windows`: 0 for a layer that sees all. `ends`: where not, the logits of special tokens are
    far below all others, so that no answer ends by itself, sampled or not. `breaking`: a token
    whose presence makes the first layer's MLP infinite, in a model whose other matrices are
    quantized and whose greedy answers do not end. `padding`: rows of the embedding that no text is
    cut into. `merge`: the token of two letters.
    """
    tokens = [*_byte_tokens(), *SPECIAL, merge, *(f"[PAD{i}]" for i in range(padding))]
    rng = np.random.default_rng(0)
    d = head_dim

    def random(*shape: int) -> np.ndarray:
        return rng.normal(0, 2 / shape[-1] ** 0.5, shape).astype(np.float32)

    norms = {"attn_norm": HIDDEN, "ffn_norm": HIDDEN}
    if architecture == "gemma3":
        norms |= {
            "post_attention_norm": HIDDEN,
            "post_ffw_norm": HIDDEN,
            "attn_q_norm": d,
            "attn_k_norm": d,
        }
    arrays = {
        "token_embd.weight": random(len(tokens), HIDDEN),
        "output_norm.weight": np.ones(HIDDEN, np.float32),
    }
    if breaking is not None:
        arrays["token_embd.weight"][256 : 256 + len(SPECIAL)] = 0  # it is the lm_head too
    for i in range(len(windows) or LAYERS):
        arrays |= {
            f"blk.{i}.{norm}.weight": np.ones(size, np.float32) for norm, size in norms.items()
        }
        arrays |= {
            f"blk.{i}.attn_q.weight": random(HEADS * d, HIDDEN),
            f"blk.{i}.attn_k.weight": random(KV_HEADS * d, HIDDEN),
            f"blk.{i}.attn_v.weight": random(KV_HEADS * d, HIDDEN),
            f"blk.{i}.attn_output.weight": random(HIDDEN, HEADS * d),
            f"blk.{i}.ffn_gate.weight": random(ffn, HIDDEN),
            f"blk.{i}.ffn_up.weight": random(ffn, HIDDEN),
            f"blk.{i}.ffn_down.weight": random(HIDDEN, ffn),
        }
    if breaking is not None:  # it alone has something in the last dimension, which nobody writes to
        arrays["output.weight"] = arrays["token_embd.weight"].copy()
        arrays["token_embd.weight"][:, -1] = 100.0 * (np.arange(len(tokens)) == breaking)
        for i in range(len(windows) or LAYERS):
            arrays[f"blk.{i}.attn_output.weight"][-1] = arrays[f"blk.{i}.ffn_down.weight"][-1] = 0
        arrays["blk.0.ffn_gate.weight"][0, -1] = 3e38
    elif not ends:  # the last dimension is 1 for every token, and no layer writes to it
        arrays["output.weight"] = arrays["token_embd.weight"].copy()
        arrays["output.weight"][:, -1] = 0
        arrays["output.weight"][256 : 256 + len(SPECIAL), -1] = -1e6
        arrays["token_embd.weight"][:, -1] = 1
        for i in range(len(windows) or LAYERS):
            arrays[f"blk.{i}.attn_output.weight"][-1] = arrays[f"blk.{i}.ffn_down.weight"][-1] = 0
    shape: dict[str, object] = {
        "context_length": context,
        "embedding_length": HIDDEN,
        "block_count": len(windows) or LAYERS,
        "feed_forward_length": ffn,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": d,
        "attention.value_length": d,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": d,
        "rope.freq_base": 10000.0,
        "vocab_size": len(tokens),
    }
    if any(windows):
        shape |= {
            "attention.sliding_window": max(windows),
            "attention.sliding_window_pattern": [w > 0 for w in windows],
        }
    metadata = {
        "general.architecture": architecture,
        **{f"{architecture}.{key}": value for key, value in shape.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            *[1] * 256,
            *[3] * len(SPECIAL),
            1,
            *[5] * padding,  # 5: unused
        ],  # 1: normal, 3: control
        "tokenizer.ggml.merges": [" ".join(merge)],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.chat_template": TEMPLATE,
    }
    plain = {"token_embd.weight", "blk.0.ffn_gate.weight"}

    def encode(name: str, array: np.ndarray) -> HostTensor:
        quantized = breaking is not None and array.ndim == 2 and name not in plain
        return quantize(array, "Q8_0") if quantized else encode_dense(array)

    write_gguf(path, metadata, ((name, encode(name, array)) for name, array in arrays.items()))
    return path


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of the tiny Llama."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def long_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose answers take minutes to fill the context, and do not end before."""
    return write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", context=100_000, ends=False)


@pytest.fixture(scope="session", params=["native", "reference"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend in turn: what the engine promises does not depend on it."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def tiny(tiny_path: Path, backend: str) -> LLM:
    """The model, loaded once; each test leaves nothing in its queue."""
    llm = LLM(tiny_path, backend=backend, speculative=None)  # each step gives one token
    llm.stats()  # its thread begins here, so that no test seems to have left it behind
    return llm


@pytest.fixture
def no_thread_is_left(
    caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest
) -> Iterator[None]:
    """No thread is left behind, and asyncio has nothing to say."""
    if "tiny" in request.fixturenames:
        request.getfixturevalue("tiny").stats()  # its thread begins here, and lives on
    before = set(threading.enumerate())
    yield
    gc.collect()
    assert [
        t.name for t in threading.enumerate() if t not in before and t.name != "tqdm_monitor"
    ] == []
    assert [
        r.getMessage()
        for r in caplog.get_records("call")
        if r.name == "asyncio" and r.levelno >= logging.WARNING
    ] == []
