"""config.json -> ModelConfig: what is read, what is refused and in which words. That it equals
transformers is tested in tests/models.
"""

import math
from typing import Any

import pytest

from pellucid.config import ModelConfig
from pellucid.errors import FormatError, UnsupportedError
from pellucid.weights.hf_config import build_hf_config

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
}


def config(model_type: str, /, **fields: Any) -> ModelConfig:
    return build_hf_config({"model_type": model_type, **SIZES, **fields}, "config.json")


def test_gpt2_has_biases_learned_positions_and_a_tied_head() -> None:
    found = build_hf_config(GPT2, "config.json")
    assert found.rope is None
    assert found.qkv_bias and found.o_bias and found.mlp_bias and found.tie_word_embeddings
    assert (found.intermediate_size, found.num_kv_heads, found.head_dim) == (128, 4, 8)
    assert (
        build_hf_config({**GPT2, "scale_attn_weights": False}, "config.json").attention_scale == 1.0
    )


def test_gpt2_takes_the_common_names_of_sizes_before_its_own() -> None:
    found = build_hf_config({**GPT2, "num_attention_heads": 8, "hidden_size": 64}, "config.json")
    assert (found.num_heads, found.hidden_size, found.num_layers) == (8, 64, 2)


def test_attention_bias_means_what_it_means_in_each_family() -> None:
    llama, qwen2, qwen3 = (
        config("llama", attention_bias=True),
        config("qwen2"),
        config("qwen3", attention_bias=True),
    )
    assert (llama.qkv_bias, llama.o_bias, llama.mlp_bias) == (True, True, False)
    assert (qwen2.qkv_bias, qwen2.o_bias, qwen2.mlp_bias) == (True, False, False)
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm) == (True, True, True)
    assert config("llama", mlp_bias=True).mlp_bias


def test_mistral_has_a_window_unless_the_file_says_null() -> None:
    assert config("mistral", max_position_embeddings=8192).windows == (4096,) * 6
    assert config("mistral", sliding_window=9).windows == (9,) * 6
    assert config("mistral", sliding_window=None).windows == (None,) * 6


def test_a_window_is_no_longer_than_the_context() -> None:
    """Files write 2³² - 1 and the like where they mean no window; kernels count in 32 bits."""
    assert config("mistral", sliding_window=(1 << 32) - 1).windows == (64,) * 6


def test_qwen_has_windows_only_where_they_are_used_and_after_the_first_layers() -> None:
    assert config("qwen2", sliding_window=9, max_window_layers=4).windows == (None,) * 6
    assert config(
        "qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=4
    ).windows == (None, None, None, None, 9, 9)


def test_gemma_layers_take_turns() -> None:
    assert config("gemma2", sliding_window=9).windows == (9, None, 9, None, 9, None)
    assert config("gemma3_text", sliding_window=9).windows == (9, 9, 9, 9, 9, None)
    assert config("gemma3_text", sliding_window=9, sliding_window_pattern=3).windows == (
        9,
        9,
        None,
        9,
        9,
        None,
    )
    types = ["full_attention", *["sliding_attention"] * 5]
    assert config("gemma3_text", sliding_window=9, layer_types=types).windows == (
        None,
        9,
        9,
        9,
        9,
        9,
    )


def test_gemma3_turns_windowed_layers_by_a_base_of_their_own() -> None:
    found = config("gemma3_text", rope_scaling={"rope_type": "linear", "factor": 8.0})
    whole, local = found.layer_rope(5), found.layer_rope(0)
    assert whole is not None and local is not None
    assert (whole.theta, whole.scaling, whole.factor) == (1_000_000.0, "linear", 8.0)
    assert (local.theta, local.scaling) == (10_000.0, "none")


def test_gemma3_has_no_cap_on_scores_whatever_its_file_says() -> None:
    """transformers' Gemma 3 does not read the field in its forward pass; its Gemma 2 does."""
    assert config("gemma3_text", attn_logit_softcapping=30.0).attn_softcap is None
    assert config("gemma2", attn_logit_softcapping=30.0).attn_softcap == 30.0


def test_dynamic_ntk_leaves_frequencies_alone_within_the_context() -> None:
    """Whatever it says of an original context: transformers does not read that for `dynamic`."""
    rope = {"type": "dynamic", "factor": 2.0}
    for fields in (rope, {**rope, "original_max_position_embeddings": 16}):
        found = config("llama", rope_scaling=fields).rope
        assert found is not None and found.scaling == "none"


def test_longrope_serves_the_context_of_its_short_factors() -> None:
    factors = {"short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [9.0] * 4}
    rope = {"type": "longrope", **factors}
    found = config("phi3", rope_scaling=rope, original_max_position_embeddings=16)
    assert found.max_position_embeddings == 16
    assert found.rope is not None and found.rope.freq_factors == (1.0, 2.0, 3.0, 4.0)
    # 64 / 16 tokens
    expected = math.sqrt(1 + math.log(4) / math.log(16))
    assert found.rope.attention_factor == pytest.approx(expected)


def test_longrope_of_phi3_was_trained_on_4096_tokens_unless_the_file_says_otherwise() -> None:
    rope = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    for within in ({}, {"original_max_position_embeddings": 16}):
        found = config("phi3", max_position_embeddings=8192, rope_scaling={**rope, **within})
        assert found.max_position_embeddings == 4096


def test_an_empty_rope_scaling_says_nothing() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    with_empty = config("llama", rope_parameters=rope, rope_scaling={})
    assert with_empty == config("llama", rope_parameters=rope)


def test_rope_parameters_of_transformers_5_mean_what_the_old_fields_meant() -> None:
    old = config("llama", rope_theta=5e5, rope_scaling={"rope_type": "linear", "factor": 2.0})
    assert old == config(
        "llama", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    )


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_mixtures_of_experts_are_called_that(model_type: str) -> None:
    key = {
        "mixtral": "num_local_experts",
        "qwen3_moe": "num_experts",
        "deepseek_v3": "n_routed_experts",
    }[model_type]
    with pytest.raises(
        UnsupportedError, match=f"{model_type} with {key} 8 is a mixture of experts"
    ):
        config(model_type, **{key: 8})


def test_unknown_architectures_are_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(
        UnsupportedError,
        match=r"model_type is 'rwkv'; known ones are: gpt2, llama, mistral, qwen2, qwen3, gemma2, "
        "gemma3_text, phi3",
    ):
        config("rwkv")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; known ones are: silu"),
        (
            {"rope_scaling": {"type": "proportional", "factor": 2.0}},
            "rope_type is 'proportional'; known ones are: default, linear",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type is 'mrope'"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7}}, "mscale is set"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is 0.5",
        ),
        ({"architectures": ["LlamaForSequenceClassification"]}, "'LlamaForSequenceClassification'"),
        ({"quantization_config": {"quant_method": "fp8", "bits": 4}}, "quantized by 'fp8'"),
        (
            {"quantization": {"group_size": 64, "bits": 4}},
            r"quantized by MLX \(4 bits\), which is not supported; the model's original folder",
        ),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"vision_config": {}}, "text and images"),
    ],
)
def test_what_is_not_built_is_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"config.json.*{message}"):
        config("llama", **fields)


@pytest.mark.parametrize(
    ("model_type", "fields", "message"),
    [
        (
            "gpt2",
            {**GPT2, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx is true",
        ),
        (
            "gpt2",
            {**GPT2, "activation_function": "relu"},
            "activation_function is 'relu'; known ones are: gelu_new, gelu_pytorch_tanh",
        ),
        ("gpt2", {**GPT2, "activation_function": "silu"}, "activation_function is 'silu'"),
        (
            "qwen2",
            {"layer_types": ["linear_attention"] * 6},
            "layer_types names 'linear_attention'",
        ),
        ("mistral", {"layer_types": ["full_attention"] * 6}, "layer_types is set"),
        ("llama", {"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, "per_layer_config is set"),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling of this family must name its rope_type",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            "rope_type is set for all layers",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            "only 'default' is supported for windowed",
        ),
    ],
)
def test_what_a_family_does_not_have_is_refused_by_name(
    model_type: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        config(model_type, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be an integer"),
        ({"hidden_size": 32.0}, "hidden_size is 32.0; it must be an integer"),
        ({"hidden_size": True}, "hidden_size is True; it must be an integer"),
        ({"hidden_size": 33}, "hidden size 33 is not a multiple"),
        ({"hidden_size": 10**30, "head_dim": 8}, "hidden_size is 1000000"),
        (
            {"hidden_size": -32, "head_dim": 8},
            "hidden_size is -32; it must be an integer between 1 and",
        ),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be at most"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_key_value_heads": 3}, "not a multiple of num_kv_heads 3"),
        ({"head_dim": 7}, "rotary_dim is 7"),
        ({"rms_norm_eps": 0}, "norm_eps is 0"),
        ({"rms_norm_eps": 10**400}, "it must be a finite number"),
        ({"rope_theta": 0.5}, "rope theta is 0.5"),
        ({"rope_theta": [1.0]}, "rope_theta is a list; it must be a finite number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; it must be an object"),
        ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -1.0}}, "rope factor is -1.0"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 2.0,
                    "original_max_position_embeddings": 0,
                }
            },
            "original_max_position_embeddings is 0",
        ),
        ({"attention_bias": "yes"}, "attention_bias is 'yes'; it must be true or false"),
        ({"model_type": 3}, "model_type is 3; it must be a string"),
        (
            {"architectures": "LlamaForCausalLM"},
            "architectures is 'LlamaForCausalLM'; it must be a list",
        ),
    ],
)
def test_impossible_values_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"config.json.*{message}"):
        config("llama", **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": None}, "names 'sliding_attention' but there is no sliding_window"),
        ({"sliding_window": 0}, r"windows\[0\] is 0; it must be an integer between 1 and"),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention"]},
            "1 windows are given for 6 layers",
        ),
        ({"sliding_window_pattern": 0, "layer_types": None}, "sliding_window_pattern is 0"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0"),
        ({"final_logit_softcapping": -1.0}, "final_softcap is -1.0"),
    ],
)
def test_impossible_values_of_gemma_are_refused_by_name(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        config("gemma3_text", **{"layer_types": ["sliding_attention"] * 6, **fields})
