"""`pellucid inspect`, on a tiny GGUF file and a tiny folder of safetensors."""

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.cli.main import main
from pellucid.formats import encode_dense, quantize
from pellucid.weights.gguf_metadata import Typed, ValueType
from pellucid.weights.gguf_writer import write_gguf

HIDDEN, FFN, VOCAB, LAYERS = 32, 64, 40, 2
MATRICES = {
    "attn_q": (32, 32),
    "attn_k": (16, 32),
    "attn_v": (16, 32),
    "attn_output": (32, 32),
    "ffn_gate": (64, 32),
    "ffn_up": (64, 32),
}


def metadata(**changes: object) -> dict[str, object]:
    """A Llama of two layers, two heads of 16 and one KV head."""
    return {
        "general.architecture": "llama",
        "general.name": "Tiny\x1b[31m Llama",
        "llama.context_length": 64,
        "llama.embedding_length": HIDDEN,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": FFN,
        "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [f"t{i}" for i in range(VOCAB)],
        "tokenizer.ggml.merges": Typed([], ValueType.STRING),
        "tokenizer.chat_template": "{{ messages }}",
    } | changes


def write_model(path: Path, said: dict[str, object]) -> Path:
    rng = np.random.default_rng(0)
    tensors = [
        ("token_embd.weight", quantize(rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32), "Q8_0"))
    ]
    tensors.append(("output_norm.weight", encode_dense(np.ones(HIDDEN, np.float32))))
    for i in range(LAYERS):
        for name, shape in (MATRICES | {"ffn_down": (32, 64)}).items():
            tensors.append(
                (
                    f"blk.{i}.{name}.weight",
                    quantize(rng.normal(size=shape).astype(np.float32), "Q4_0"),
                )
            )
        tensors += [
            (f"blk.{i}.{name}.weight", encode_dense(np.ones(HIDDEN, np.float32)))
            for name in ("attn_norm", "ffn_norm")
        ]
    write_gguf(path, said, tensors)
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_model(tmp_path / "tiny.gguf", metadata())


def inspect(*arguments: str | Path) -> str:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def report(path: Path) -> dict[str, Any]:
    found = json.loads(inspect(path, "--json"))
    assert isinstance(found, dict)
    return found


def test_the_report_of_a_gguf_file_adds_up(tiny: Path) -> None:
    found = report(tiny)
    assert found["runs"] and found["obstacle"] is None
    assert (found["container"], found["architecture"], found["name"]) == (
        "GGUF 3",
        "llama",
        "Tiny\x1b[31m Llama",
    )
    assert (
        found["config"]["num_layers"],
        found["config"]["num_kv_heads"],
        found["config"]["vocab_size"],
    ) == (LAYERS, 1, VOCAB)
    assert found["kv_bytes_per_token"] == {
        "float32": 2 * LAYERS * 1 * 16 * 4,
        "float16": 2 * LAYERS * 1 * 16 * 2,
    }
    assert (
        found["tokenizer"] == f"gpt2 smollm, {VOCAB} tokens"
        and found["chat_template"] == "{{ messages }}"
    )
    assert (
        found["metadata"]["llama.context_length"] == 64
        and "tokenizer.ggml.tokens" not in found["metadata"]
    )
    bits = {row["format"]: row["bits_per_weight"] for row in found["formats"]}
    assert bits == {"Q4_0": 4.5, "Q8_0": 8.5, "F32": 32.0}
    for key, column in (("weights", "weights"), ("tensor_bytes", "bytes")):
        assert found[key] == sum(row[column] for row in found["formats"])
    assert found["weights"] == sum(math.prod(tensor["shape"]) for tensor in found["tensors"])
    assert found["bits_per_weight"] == pytest.approx(8 * found["tensor_bytes"] / found["weights"])


def test_people_get_the_same_facts_as_lines(tiny: Path) -> None:
    text = inspect(tiny)
    assert "architecture   llama\n" in text and "num_kv_heads 1," in text
    assert "KV cache       256 bytes per token as float32, 16.4 kB for all 64 tokens" in text
    assert "chat template  yes, 14 characters" in text
    assert "\x1b" not in text and "Tiny\\x1b[31m Llama" in text
    assert [line.split()[0] for line in text.split("\n\n")[1].splitlines()] == [
        "format",
        "Q4_0",
        "Q8_0",
        "F32",
        "all",
    ]
    assert "blk.1.ffn_down.weight" not in text
    listed = inspect(tiny, "--tensors")
    assert listed.startswith(text) and re.search(
        r"blk\.1\.ffn_down\.weight +Q4_0 +32 × 64 +1\.2 kB", listed
    )


def test_a_model_that_cannot_run_is_shown_with_the_reason(tmp_path: Path) -> None:
    path = write_model(
        tmp_path / "odd.gguf", metadata(**{"general.architecture": "mamba", "odd": float("nan")})
    )
    found = report(path)
    assert not found["runs"] and "mamba" in found["obstacle"]
    assert (found["architecture"], found["config"], found["metadata"]["odd"]) == (
        "mamba",
        None,
        "nan",
    )
    assert len(found["tensors"]) == 2 + 9 * LAYERS
    assert "does not run   " in inspect(path)


def test_no_weight_is_read(tmp_path: Path) -> None:
    """A terabyte of weights, which is a hole in the file: to read it would take minutes."""
    path = write_model(tmp_path / "large.gguf", metadata())
    key, value = b"general.architecture", b"none"
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 1)
    header += struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(value)) + value
    header += struct.pack("<Q", 4) + b"hole" + struct.pack("<IQQIQ", 2, 1 << 19, 1 << 19, 0, 0)
    with path.open("wb") as file:
        file.write(header)
        file.truncate(4096 + (1 << 40))
    assert report(path)["formats"] == [
        {
            "format": "F32",
            "tensors": 1,
            "weights": 1 << 38,
            "bytes": 1 << 40,
            "bits_per_weight": 32.0,
        }
    ]


def write_folder(folder: Path) -> Path:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)
    d, kv = HIDDEN, HIDDEN // 2
    tensors = {"model.embed_tokens.weight": (VOCAB, d), "model.norm.weight": (d,)}
    for i in range(LAYERS):
        p = f"model.layers.{i}."
        tensors |= {f"{p}input_layernorm.weight": (d,), f"{p}post_attention_layernorm.weight": (d,)}
        tensors |= {
            f"{p}self_attn.q_proj.weight": (d, d),
            f"{p}self_attn.k_proj.weight": (kv, d),
            f"{p}self_attn.v_proj.weight": (kv, d),
        }
        tensors |= {
            f"{p}self_attn.o_proj.weight": (d, d),
            f"{p}mlp.gate_proj.weight": (FFN, d),
            f"{p}mlp.up_proj.weight": (FFN, d),
        }
        tensors |= {f"{p}mlp.down_proj.weight": (d, FFN)}
    folder.mkdir()
    save_file(
        {name: rng.normal(size=shape).astype(np.float16) for name, shape in tensors.items()},
        folder / "model.safetensors",
    )
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": d,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
    }
    config |= {
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    config |= {
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_folder_of_safetensors_is_shown_like_a_file(tmp_path: Path) -> None:
    found = report(write_folder(tmp_path / "llama"))
    assert found["obstacle"] is None
    assert (found["container"], found["architecture"]) == ("safetensors", "llama")
    assert found["bits_per_weight"] == 16.0 and [row["format"] for row in found["formats"]] == [
        "F16"
    ]
    assert found["kv_bytes_per_token"]["float32"] == 2 * LAYERS * 16 * 4
    assert found["tokenizer"].startswith("none that can be used: ")


def test_a_folder_of_gguf_files_asks_for_one_of_them(tiny: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tiny.parent)])
    assert result.exit_code == 0 and str(tiny) in result.stdout
    (tiny.parent / "other.gguf").write_bytes(tiny.read_bytes())
    result = CliRunner().invoke(main, ["inspect", str(tiny.parent)])
    assert result.exit_code == 1 and f"one of them: other.gguf, {tiny.name}" in result.stderr


@pytest.mark.slow
def test_real_models_are_inspected_in_a_moment(models_dir: Path) -> None:
    for path in sorted(models_dir.glob("*.gguf")):
        found = report(path)
        assert found["runs"], found["obstacle"]
        assert 2 < found["bits_per_weight"] < 33


def test_a_tokenizer_that_cannot_be_used_is_told_for_a_gguf_file_too(tmp_path: Path) -> None:
    said = metadata(**{"tokenizer.ggml.model": "unheard-of"})
    path = write_model(tmp_path / "x.gguf", said)
    result = CliRunner().invoke(main, ["inspect", str(path)])
    assert result.exit_code == 0
    assert "none that can be used: " in result.stdout and "unheard-of" in result.stdout
