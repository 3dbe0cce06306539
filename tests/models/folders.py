"""Tiny folders of every family with random weights and a tokenizer, as a hub holds them.

The configs are those of the golden models. Weights are drawn from a seeded generator, so that
golden files can be made from the same folders (tests/golden/convert/make_golden.py).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from safetensors.numpy import save_file
from tokenizers import AddedToken, decoders, models, normalizers, processors

from pellucid.tokenizer.pretokenizers import build_pretokenizer, get_pretokenizer
from pellucid.tokenizer.vocabulary import byte_letters
from pellucid.weights.families import hf_source_of
from pellucid.weights.hf_config import build_hf_config
from pellucid.weights.unfold import file_tensors

from .harness import GOLDEN

__all__ = ["FOLDERS", "TEXT", "write_folder"]

VOCAB_SIZE = 384
TEXT = "the hello world in an er the llama, went. " * 400
# what GGUF files cannot hold of the golden configs
_CHANGES: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "gpt2": {"n_ctx": 64},  # llama.cpp's converter reads it
    "qwen2": {"use_sliding_window": False, "layer_types": None},
}
# SentencePiece's way of cutting, and whether it puts a space before a text
_PIECES = {"gemma2": False, "gemma3": False, "mistral": True, "phi3": True}
_PRE = {"gpt2": "gpt-2", "llama": "smollm", "llama3": "llama-bpe", "qwen2": "qwen2"}
FOLDERS = (
    *("gemma2", "gemma3", "gpt2", "llama", "llama-yarn", "llama3", "mistral", "phi3", "qwen2"),
    "qwen3",
)
_MERGED = ("he", "ll", "llo", "hello", "wo", "rl", "rld", "world", "th", "the", "in", "er", "an")


def write_folder(path: Path, name: str, dtype: str = "float32", **changes: object) -> Path:
    """The folder `path`, with the family and config of the golden model `name`, changed."""
    path.mkdir(parents=True, exist_ok=True)
    values = json.loads((GOLDEN / name / "config.json").read_text())
    values |= {"vocab_size": VOCAB_SIZE, **_CHANGES.get(name, {}), **changes}
    values |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": dtype, "dtype": dtype}
    values = {key: value for key, value in values.items() if value is not None}
    (path / "config.json").write_text(json.dumps(values, indent=1))
    # weights
    config = build_hf_config(values, "config.json")
    rng = np.random.default_rng(7)
    tensors = {}
    for tensor, made in file_tensors(config, hf_source_of(config.architecture)).items():
        scale = 0.05 if len(made.shape) == 1 else made.shape[-1] ** -0.5
        drawn = rng.standard_normal(made.shape, np.float32) * np.float32(scale)
        norm = "norm" in tensor and not values["model_type"].startswith("gemma")
        tensors[tensor] = (drawn + np.float32(norm)).astype(dtype)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    _write_tokenizer(path, name)
    return path


def _write_tokenizer(path: Path, name: str) -> None:
    rust = (
        _pieces(_PIECES[name], name == "phi3")
        if name in _PIECES
        else _byte_level(_PRE.get(name, "qwen2"))
    )
    rust.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>" if name in _PIECES else None,
        "chat_template": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "top_k": 7, "do_sample": True, "eos_token_id": 2})
    )


def _byte_level(pre: str) -> "tokenizers.Tokenizer":
    """GPT-2's way, with the words of one of GGUF's kinds."""
    row = get_pretokenizer(pre)
    special = ["<unk>", "<s>", "</s>", "<|im_end|>"]
    vocab = {text: i for i, text in enumerate([*special, *map(byte_letters, _bytes())])}
    merges = _merges(vocab)
    rust = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=row.ignore_merges))
    if row.nfc:
        rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = build_pretokenizer(row)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    rust.add_tokens([AddedToken("<tool>", normalized=False, special=False)])
    if row.add_bos:
        _put_bos(rust)
    return rust


def _pieces(space_prefix: bool, swallow: bool) -> "tokenizers.Tokenizer":
    """SentencePiece's way. `swallow`: some special tokens match the white space after them."""
    special = ["<unk>", "<s>", "</s>", "<|endoftext|>"]  # llama.cpp looks for all four in Phi-3
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz.,!'", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {text: i for i, text in enumerate([*special, *letters])}
    merges = _merges(vocab, every=True)
    rust = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    prefix = [normalizers.Prepend("▁")] if space_prefix else []
    rust.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if space_prefix else []
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    rust.add_special_tokens(
        [AddedToken(text, normalized=False, rstrip=swallow and text == "</s>") for text in special]
    )
    _put_bos(rust)
    return rust


def _merges(vocab: dict[str, int], *, every: bool = False) -> list[tuple[str, str]]:
    """Merges that make `_MERGED`, which join the vocabulary. `every`: every way to make each word,
    as in files that were made from SentencePiece's.
    """
    merges = []
    for word in _MERGED:
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [pair for pair in cuts if {*pair} <= vocab.keys()]
        merges += known if every else known[-1:]
        vocab[word] = len(vocab)
    return merges


def _bytes() -> list[bytes]:
    return [bytes([byte]) for byte in range(256)]


def _put_bos(rust: "tokenizers.Tokenizer") -> None:
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
