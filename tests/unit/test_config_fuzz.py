"""Configs with arbitrary values in them become a usable ModelConfig or one clear error; nothing
else escapes, and nothing takes long.
"""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.config import ModelConfig
from pellucid.errors import PellucidError
from pellucid.models.blocks import build_rope_tables
from pellucid.weights.gguf_config import build_gguf_config
from pellucid.weights.hf_config import build_hf_config

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MODEL_TYPES = ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"]
ROPE = [
    "rope_type",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "rope_theta",
    "beta_fast",
    "mscale",
    "mscale_all_dim",
    "short_factor",
    "long_factor",
    "partial_rotary_factor",
]
KEYS = [
    *SIZES,
    "head_dim",
    "rope_theta",
    "sliding_window",
    "layer_types",
    "rms_norm_eps",
    "architectures",
    "use_sliding_window",
    "n_embd",
]
GGUF_KEYS = [
    "block_count",
    "attention.head_count",
    "attention.key_length",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
]
GGUF_KEYS += [
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "context_length",
    "vocab_size",
]
NUMBERS = (
    st.integers(-4, 100)
    | st.integers()
    | st.floats()
    | st.sampled_from([0, 1, 1 << 24, 1 << 63, 10**400, 1e308, 5e-324])
)
SCALARS = (
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=4)
    | st.sampled_from(["linear", "yarn", "llama3", "dynamic", "default", "longrope"])
)
VALUES = (
    SCALARS
    | st.lists(SCALARS, max_size=4)
    | st.dictionaries(st.sampled_from(ROPE), SCALARS, max_size=5)
)


def check_usable(config: ModelConfig) -> None:
    tables = build_rope_tables(config)
    assert len(tables) == config.num_layers
    assert all(
        0 <= f < float("inf") for table in tables if table is not None for f in table.inv_freq
    )


@settings(max_examples=300, derandomize=True)
@given(
    st.sampled_from(MODEL_TYPES),
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=3),
    st.none() | st.dictionaries(st.sampled_from(ROPE), SCALARS, max_size=6),
)
def test_any_config_json(
    model_type: str, changes: dict[str, Any], rope: dict[str, Any] | None
) -> None:
    values = {
        "model_type": model_type,
        **SIZES,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 8,
        "rope_scaling": rope,
        **changes,
    }
    try:
        config = build_hf_config(values, "config.json")
    except PellucidError as error:
        assert "config.json" in str(error) and len(str(error)) < 400
    else:
        check_usable(config)


@settings(max_examples=300, derandomize=True)
@given(
    st.sampled_from(["gpt2", "llama", "qwen2", "gemma2", "gemma3", "phi3"]),
    st.dictionaries(st.sampled_from(GGUF_KEYS), VALUES, max_size=4),
)
def test_any_gguf_metadata(arch: str, changes: dict[str, Any]) -> None:
    values = {
        "block_count": 3,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": 1e-5,
        **changes,
    }
    if arch != "gpt2":
        del values["attention.layer_norm_epsilon"]
    else:
        del values["attention.layer_norm_rms_epsilon"]
    metadata = {
        "general.architecture": arch,
        **{f"{arch}.{key}": value for key, value in values.items()},
    }
    try:
        config = build_gguf_config(metadata, {"token_embd.weight": (96, 32)}, {}, "file.gguf")
    except PellucidError as error:
        assert "file.gguf" in str(error) and len(str(error)) < 400
    else:
        check_usable(config)
