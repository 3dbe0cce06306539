"""GGUF metadata -> ModelConfig: what is read, what is taken for granted as llama.cpp does, and what
is refused.
"""

from typing import Any

import pytest

from pellucid.config import ModelConfig
from pellucid.errors import FormatError, UnsupportedError
from pellucid.weights.gguf_config import build_gguf_config

SHAPES: dict[str, tuple[int, ...]] = {"token_embd.weight": (96, 32)}


def config(
    arch: str = "llama",
    *,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    freqs: list[float] | None = None,
    general: Any = None,
    **keys: Any,
) -> ModelConfig:
    """Keyword `attention__scale` stands for the key "<arch>.attention.scale"; a value of None
    leaves the key out.
    """
    eps = "layer_norm_epsilon" if arch == "gpt2" else "layer_norm_rms_epsilon"
    values = {
        "block_count": 6,
        "context_length": 64,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": 4,
        f"attention.{eps}": 1e-5,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    metadata = {f"{arch}.{key}": value for key, value in values.items() if value is not None}
    return build_gguf_config(
        {"general.architecture": arch, **(general or {}), **metadata},
        shapes,
        {} if freqs is None else {"rope_freqs.weight": freqs},
        "file.gguf",
    )


def test_absent_keys_have_llama_cpps_defaults() -> None:
    found = config()
    assert (found.vocab_size, found.num_kv_heads, found.head_dim) == (96, 4, 8)
    assert found.rope is not None and (
        found.rope.theta,
        found.rope.rotary_dim,
        found.rope.scaling,
    ) == (10_000.0, 8, "none")
    assert found.windows == (None,) * 6 and found.activation == "silu"


def test_biases_and_an_untied_head_are_there_when_their_tensors_are() -> None:
    plain = config("qwen2")
    assert (plain.qkv_bias, plain.o_bias, plain.mlp_bias, plain.tie_word_embeddings) == (
        False,
        False,
        False,
        True,
    )
    names = ("blk.0.attn_q.bias", "blk.0.attn_output.bias", "blk.0.ffn_down.bias", "output.weight")
    full = config("qwen2", shapes={**SHAPES, **dict.fromkeys(names, (1,))})
    assert (full.qkv_bias, full.o_bias, full.mlp_bias, full.tie_word_embeddings) == (
        True,
        True,
        True,
        False,
    )


def test_the_vocabulary_is_the_files_own_number_where_it_has_one() -> None:
    assert config(vocab_size=90).vocab_size == 90


def test_per_layer_lists_of_one_value_are_that_value() -> None:
    assert config(attention__head_count_kv=[2] * 6).num_kv_heads == 2
    with pytest.raises(
        FormatError, match=r"llama\.attention\.head_count_kv is a list whose values differ"
    ):
        config(attention__head_count_kv=[2, 2, 4, 2, 2, 2])


def test_gemma_layers_take_turns() -> None:
    assert config("gemma2", context_length=8192).windows == (4096, None) * 3
    assert config("gemma3", attention__sliding_window=9).windows == (9, 9, 9, 9, 9, None)
    assert (
        config("gemma3", attention__sliding_window=9, attention__sliding_window_pattern=2).windows
        == (9, None) * 3
    )
    pattern = [True, False, False, True, True, True]
    assert config(
        "gemma3", attention__sliding_window=9, attention__sliding_window_pattern=pattern
    ).windows == (9, None, None, 9, 9, 9)
    assert config("gemma3").windows == (None,) * 6


def test_a_window_of_a_llama_file_holds_for_all_layers() -> None:
    assert config(attention__sliding_window=9).windows == (9,) * 6
    assert config(attention__sliding_window=0).windows == (None,) * 6


def test_gemma_scales_scores_by_head_dim_but_in_its_27b_models() -> None:
    assert (
        config("gemma2", attention__key_length=16, attention__value_length=16).attention_scale
        == 16**-0.5
    )
    for arch, layers in (("gemma2", 46), ("gemma3", 62)):
        found = config(
            arch, block_count=layers, attention__key_length=16, attention__value_length=16
        )
        assert found.attention_scale == (32 // 4) ** -0.5


def test_gemma2_has_softcaps_and_gemma3_has_none() -> None:
    second, third = config("gemma2"), config("gemma3")
    assert (second.attn_softcap, second.final_softcap) == (50.0, 30.0)
    assert (third.attn_softcap, third.final_softcap) == (None, None)
    assert config("gemma2", attn_logit_softcapping=0.0).attn_softcap is None


def test_gemma3_scales_only_layers_without_a_window() -> None:
    found = config(
        "gemma3",
        attention__sliding_window=9,
        rope__freq_base=1e6,
        rope__scaling__type="linear",
        rope__scaling__factor=8.0,
    )
    whole, local = found.layer_rope(5), found.layer_rope(0)
    assert whole is not None and local is not None
    assert (whole.theta, whole.scaling, whole.factor) == (1e6, "linear", 8.0)
    assert (local.theta, local.scaling) == (10_000.0, "none")
    other = config("gemma3", attention__sliding_window=9, rope__freq_base_swa=123.0).layer_rope(0)
    assert other is not None and other.theta == 123.0


def test_a_scaling_factor_without_a_type_is_linear_and_none_wins_over_it() -> None:
    linear = config(rope__scaling__factor=4.0).rope
    assert linear is not None and (linear.scaling, linear.factor) == ("linear", 4.0)
    old = config(rope__scale_linear=4.0).rope
    assert old == linear
    none = config(rope__scaling__factor=4.0, rope__scaling__type="none").rope
    assert none is not None and none.scaling == "none"


def test_yarn_reads_its_context_betas_and_factors() -> None:
    keys: dict[str, Any] = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
        "rope__scaling__original_context_length": 16,
    }
    plain = config(**keys).rope
    assert plain is not None and (plain.scaling, plain.original_max_position_embeddings) == (
        "yarn",
        16,
    )
    assert plain.attention_factor == pytest.approx(1.1386294)
    tuned = config(
        **keys,
        rope__scaling__yarn_beta_fast=16.0,
        rope__scaling__yarn_attn_factor=1.5,
        rope__scaling__attn_factor=0.5,
    ).rope
    assert tuned is not None and (tuned.beta_fast, tuned.beta_slow, tuned.attention_factor) == (
        16.0,
        1.0,
        0.75,
    )
    assert (
        config(rope__scaling__type="yarn", rope__scaling__factor=4.0).rope
        == config(**{**keys, "rope__scaling__original_context_length": 64}).rope
    )


def test_rope_factors_of_the_file_become_the_configs() -> None:
    found = config(freqs=[1.0, 2.0, 4.0, 8.0]).rope
    assert found is not None and (found.scaling, found.freq_factors) == (
        "factors",
        (1.0, 2.0, 4.0, 8.0),
    )
    with pytest.raises(FormatError, match="3 freq_factors; rotary_dim 8 needs 4"):
        config(freqs=[1.0, 2.0, 4.0])


def test_keys_that_cannot_change_the_forward_pass_are_not_looked_at() -> None:
    found = config(
        rope__scaling__finetuned=True,
        tensor_data_layout="Meta AI original pth",
        pooling_type=3,
        attention__max_alibi_bias=0.0,
    )
    assert found == config()


@pytest.mark.parametrize(
    ("arch", "keys", "message"),
    [
        ("llama", {"expert_count": 8}, "llama with expert_count 8 is a mixture of experts"),
        ("llama", {"attention__scale": 0.5}, "attention.scale is set"),
        ("llama", {"attention__clamp_kqv": 8.0}, "attention.clamp_kqv is set"),
        ("llama", {"attention__causal": False}, "attention.causal is false"),
        ("llama", {"logit_scale": 0.0625}, "logit_scale is set"),
        ("llama", {"use_parallel_residual": True}, "use_parallel_residual is set"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ("llama", {"rope__dimension_sections": [8, 12, 12, 0]}, "rope.dimension_sections is set"),
        ("llama", {"rope__dimension_count": 4}, "rope.dimension_count is 4"),
        ("llama", {"attention__value_length": 16}, "attention.value_length differs"),
        (
            "llama",
            {"rope__scaling__type": "longrope"},
            "rope.scaling.type is 'longrope'; known ones are: none, linear, yarn",
        ),
        (
            "llama",
            {"rope__scaling__type": "yarn", "rope__scaling__yarn_log_multiplier": 0.1},
            "yarn_log_multiplier",
        ),
        ("qwen2", {"attention__sliding_window": 9}, "attention.sliding_window is set"),
        ("gpt2", {"rope__freq_base": 10_000.0}, "rope.freq_base is set"),
        (
            "falcon",
            {},
            "architecture is 'falcon'; known ones are: gpt2, llama, qwen2, qwen3, gemma2, gemma3, "
            "phi3",
        ),
    ],
)
def test_what_is_not_built_is_refused_by_name(
    arch: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"file.gguf.*{message}"):
        config(arch, **keys)


def test_factors_together_with_a_scaling_are_refused() -> None:
    with pytest.raises(UnsupportedError, match=r"'linear' together with rope_freqs\.weight"):
        config(freqs=[1.0] * 4, rope__scaling__factor=2.0)


@pytest.mark.parametrize("kind", ["mmproj", "imatrix", "adapter"])
def test_files_that_are_no_models_are_refused(kind: str) -> None:
    with pytest.raises(UnsupportedError, match=f"of type '{kind}'"):
        config(general={"general.type": kind})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"block_count": None}, "llama.block_count is missing"),
        ({"block_count": 1 << 31}, "block_count 2147483648"),
        ({"attention__head_count": 0}, "head_count 0"),
        ({"attention__head_count": 33}, "head_count 33"),
        ({"embedding_length": "32"}, "llama.embedding_length is '32'; it must be an integer"),
        ({"feed_forward_length": 1 << 40}, "intermediate_size is 1099511627776"),
        ({"context_length": 0}, "max_position_embeddings is 0"),
        (
            {"attention__layer_norm_rms_epsilon": float("nan")},
            "layer_norm_rms_epsilon is nan; it must be a finite number",
        ),
        ({"rope__freq_base": float("inf")}, "rope.freq_base is inf"),
        ({"rope__scaling__factor": -2.0}, "rope factor is -2.0"),
    ],
)
def test_impossible_values_are_refused_by_name(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=f"file.gguf.*{message}"):
        config(**keys)


@pytest.mark.parametrize("pattern", [0, -1, True, [True], "all"])
def test_impossible_layer_patterns_are_refused(pattern: object) -> None:
    with pytest.raises(
        FormatError, match="sliding_window_pattern is neither a positive number nor a list of 6"
    ):
        config("gemma3", attention__sliding_window=9, attention__sliding_window_pattern=pattern)


def test_a_file_without_an_architecture_is_refused() -> None:
    with pytest.raises(FormatError, match=r"general\.architecture is missing"):
        build_gguf_config({}, SHAPES, {}, "file.gguf")
