"""Every family against transformers itself, on fresh random weights: as the golden files, where
torch and transformers are installed.
"""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.models.rope import build_rope_table
from pellucid.weights.fields import Fields
from pellucid.weights.hf_config import build_hf_config
from pellucid.weights.hf_rope import build_rope

from .harness import GOLDEN_NAMES, Session, check_close, load

torch = pytest.importorskip(
    "torch", reason="torch is not installed; it computes what the models are compared with"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; it is what the models are compared with"
)

from ..golden.models.make_golden import FAMILIES, build_model, compute_logits  # noqa: E402

torch.set_num_threads(1)  # the products are tiny: threads would only wait for each other


@pytest.mark.parametrize("seed", [101])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_those_of_transformers(name: str, seed: int, tmp_path: Path) -> None:
    config, how = FAMILIES[name]
    dtype = how.get("dtype", torch.float32)
    model = build_model(config, seed, dtype)
    # a copy is rounded: the frequencies of RoPE, which are no weights, would lose bits as well
    copy.deepcopy(model).to(dtype).save_pretrained(tmp_path)
    loaded = load(tmp_path, "reference")
    length = min(61, loaded.config.max_position_embeddings)
    input_ids = np.random.default_rng(seed).integers(0, config.vocab_size, length).astype(np.int32)
    check_close(Session(loaded).prefill(input_ids), compute_logits(model, input_ids))


def test_every_family_has_a_golden_file() -> None:
    assert sorted(FAMILIES) == GOLDEN_NAMES


LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 64 for i in range(64)],
    "long_factor": [2.0 + i for i in range(64)],
}
# Every method, with and without each field that may stand beside it. "outer" fields stand beside
# rope_parameters.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "default-original": {"rope_type": "default", "original_max_position_embeddings": 4096},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "linear-original": {
        "rope_type": "linear",
        "factor": 3.0,
        "original_max_position_embeddings": 4096,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic-original": {
        "rope_type": "dynamic",
        "factor": 2.0,
        "original_max_position_embeddings": 4096,
    },
    "dynamic-outer": {
        "rope_type": "dynamic",
        "factor": 2.0,
        "outer": {"original_max_position_embeddings": 4096},
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0},
    "yarn-original": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 4096},
    "yarn-outer": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 4096,
        "outer": {"original_max_position_embeddings": 2048},
    },
    "yarn-no-factor": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 4096,
    },
    "yarn-attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.5,
        "beta_fast": 16.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.9,
    },
    "yarn-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.9},
    "yarn-one-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7},
    "yarn-no-mscale": {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 0.0},
    "yarn-whole-ramp": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "yarn-null-truncate": {"rope_type": "yarn", "factor": 4.0, "truncate": None},
    "yarn-no-betas": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0, "beta_slow": None},
    "yarn-far": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "yarn-shrinks": {"rope_type": "yarn", "factor": 0.5},
    "llama3": {**LLAMA3, "original_max_position_embeddings": 8192},
    "llama3-no-original": LLAMA3,
    "llama3-outer": {**LLAMA3, "outer": {"original_max_position_embeddings": 4096}},
    "longrope": {**LONGROPE, "original_max_position_embeddings": 4096},
    "longrope-no-original": LONGROPE,
    "longrope-factor": {**LONGROPE, "original_max_position_embeddings": 4096, "factor": 4.0},
    "longrope-attention": {**LONGROPE, "attention_factor": 1.25},
    "longrope-outer": {**LONGROPE, "outer": {"original_max_position_embeddings": 2048}},
}


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ROPES)
def test_rope_frequencies_equal_those_of_transformers(
    name: str, spelling: str, tmp_path: Path
) -> None:
    rope, outer = dict(ROPES[name]), dict(ROPES[name].get("outer", {}))
    rope.pop("outer", None)
    if spelling == "rope_scaling":
        outer["rope_theta"] = 500_000.0
    else:
        rope["rope_theta"] = 500_000.0
    values = {
        "model_type": "llama",
        "hidden_size": 512,
        "num_attention_heads": 4,
        "max_position_embeddings": 32768,
        **outer,
        spelling: rope,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    module = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    table = build_rope_table(build_rope(Fields("config.json", values), 128))
    np.testing.assert_allclose(table.inv_freq, module.inv_freq.numpy(), rtol=1e-5)
    assert table.scale == pytest.approx(module.attention_scaling, rel=1e-6)


# config.json as transformers 4 wrote it, with what it left out left out
OLD: dict[str, dict[str, Any]] = {
    "llama3": {
        "model_type": "llama",
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama2": {
        "model_type": "llama",
        "rope_scaling": None,
        "pretraining_tp": 1,
        "torch_dtype": "float16",
    },
    "llama-linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}},
    "mistral": {"model_type": "mistral", "num_key_value_heads": 8, "rope_theta": 1e6},
    "mistral-v3": {"model_type": "mistral", "num_key_value_heads": 8, "sliding_window": None},
    "qwen2": {
        "model_type": "qwen2",
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "max_window_layers": 3,
        "sliding_window": 100,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "qwen3": {
        "model_type": "qwen3",
        "num_key_value_heads": 2,
        "use_sliding_window": False,
        "sliding_window": 77,
    },
    "gemma2": {"model_type": "gemma2", "sliding_window": 4096},
    "gemma3": {
        "model_type": "gemma3_text",
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "rope_local_base_freq": 12345,
    },
    "gemma3-pattern": {"model_type": "gemma3_text", "sliding_window_pattern": 2, "rope_theta": 5e5},
}


@pytest.mark.parametrize("name", OLD)
def test_old_config_files_mean_what_transformers_takes_them_for(name: str, tmp_path: Path) -> None:
    """transformers reads the old file and writes it in its own spelling, with every default filled
    in; both give one config.
    """
    sizes = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "max_position_embeddings": 131072,
    }
    old = {**sizes, **OLD[name]}
    (tmp_path / "config.json").write_text(json.dumps(old))
    model = transformers.AutoConfig.from_pretrained(tmp_path)
    assert build_hf_config(old, "old") == build_hf_config(
        json.loads(json.dumps(model.to_dict())), "new"
    )
