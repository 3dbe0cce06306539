"""Every field of every family's config.json, changed, against transformers: a change moves our
logits as it moves those of transformers, or it is refused, or it moves neither.

Fields that a family's config class does not have are tried as well, all of them at once: those of
other families, and of families that are not built here. transformers ignores most of them; none may
be half applied.
"""

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.errors import PellucidError
from pellucid.weights.families import FAMILIES

from .harness import RELATIVE_BUDGET, Session, load

torch = pytest.importorskip(
    "torch", reason="torch is not installed; it computes what the models are compared with"
)
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; it is what the models are compared with"
)

from safetensors.torch import save_file  # noqa: E402

from ..golden.models.make_golden import build_model, compute_logits  # noqa: E402

torch.set_num_threads(1)  # the products are tiny: threads would only wait for each other

LENGTH = 24
SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GPT2: dict[str, Any] = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_inner": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
}
TURNS = ["sliding_attention", "full_attention", "sliding_attention"]
GLOBAL = {"rope_type": "default", "rope_theta": 1000.0}
BASES: dict[str, dict[str, Any]] = {
    "gpt2": GPT2,
    "llama": SIZES,
    "mistral": {**SIZES, "sliding_window": 9},
    "qwen2": {**SIZES, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "qwen3": {**SIZES, "use_sliding_window": True, "sliding_window": 9, "head_dim": 8},
    "gemma2": {**SIZES, "head_dim": 8, "sliding_window": 9, "query_pre_attn_scalar": 24},
    "gemma3_text": {
        **SIZES,
        "head_dim": 8,
        "sliding_window": 9,
        "query_pre_attn_scalar": 24,
        "layer_types": TURNS,
    },
    "phi3": {**SIZES, "sliding_window": 9, "pad_token_id": None},
}

# field -> values that it is given, in every family; MISSING takes it out of the file
MISSING = object()
VALUES: dict[str, list[Any]] = {
    # sizes
    "vocab_size": [56],
    "hidden_size": [64, MISSING],
    "intermediate_size": [80],
    "num_hidden_layers": [2],
    "num_attention_heads": [8, 2],
    "num_key_value_heads": [1, 4, None, MISSING],
    "head_dim": [16, 12, None, MISSING],
    "max_position_embeddings": [128],
    "n_embd": [64],
    "n_head": [2],
    "n_layer": [2],
    "n_positions": [128],
    "n_inner": [None, 80],
    # activations, norms, biases
    "hidden_act": ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast", "relu"],
    "hidden_activation": ["silu", "gelu", "gelu_pytorch_tanh", "relu"],
    "activation_function": ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"],
    "rms_norm_eps": [0.1],
    "layer_norm_epsilon": [0.1],
    "attention_bias": [True],
    "mlp_bias": [True],
    "qkv_bias": [True],
    "use_qk_norm": [True],
    "tie_word_embeddings": [True, False, MISSING],
    # windows and layer types
    "sliding_window": [4, 200, (1 << 32) - 1, None, MISSING],
    "use_sliding_window": [True, False],
    "max_window_layers": [0, 2, MISSING],
    "layer_types": [TURNS, ["full_attention"] * 3, ["linear_attention"] * 3, None, MISSING],
    "sliding_window_pattern": [2, 3],
    "_sliding_window_pattern": [2],
    "use_bidirectional_attention": [True],
    "no_rope_layers": [[1, 0, 1]],
    "attention_chunk_size": [8],
    # scales and caps
    "query_pre_attn_scalar": [8, 64, MISSING],
    "attn_logit_softcapping": [0.5, None],
    "final_logit_softcapping": [0.5, None],
    "scale_attn_weights": [False],
    "scale_attn_by_inverse_layer_idx": [True],
    "reorder_and_upcast_attn": [True],
    "embedding_scale": [3.0],
    "embedding_multiplier": [3.0],
    "residual_multiplier": [0.5],
    "attention_multiplier": [0.5],
    "logits_scaling": [4.0],
    "logit_scale": [4.0],
    "scale_emb": [3.0],
    "per_layer_config": [{"1": {"rms_norm_eps": 0.1, "layer_norm_epsilon": 0.1}}],
    "add_cross_attention": [True],
    "is_encoder_decoder": [True],
    "chunk_size_feed_forward": [1],
    "pretraining_tp": [2],
    # positions
    "rope_theta": [100.0],
    "rope_local_base_freq": [50.0],
    "default_theta": [77.0],
    "partial_rotary_factor": [0.5],
    "original_max_position_embeddings": [16],
    "rope_interleaved": [True],
    "rope_scaling": [
        {"type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5},
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0], "long_factor": [9.0] * 4},
    ],
    "rope_parameters": [
        GLOBAL,
        {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
        {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5},
        {"full_attention": GLOBAL, "sliding_attention": {**GLOBAL, "rope_theta": 30.0}},
        {"full_attention": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
        {"full_attention": {"rope_type": "linear", "factor": 4.0}, "sliding_attention": None},
    ],
}
# fields of config classes that say nothing of the forward pass
INERT = {
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "bos_token_id",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "label2id",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "resid_pdrop",
    "return_dict",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "tie_last_hidden_states",
    "transformers_version",
    "use_cache",
}


def theirs(folder: Path, input_ids: NDArray[np.int32]) -> NDArray[np.float32] | Exception:
    """The logits of a model with lively weights made from config.json; they are saved beside it."""
    try:
        model = build_model(transformers.AutoConfig.from_pretrained(folder), 7)
        logits = compute_logits(model, input_ids)
    except Exception as error:
        return error
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    return logits


def ours(folder: Path, input_ids: NDArray[np.int32]) -> NDArray[np.float32] | PellucidError:
    try:
        return Session(load(folder, "reference")).prefill(input_ids)
    except PellucidError as error:
        return error


# what every family is tried with, whether its config class has the field or not
EVERYWHERE = {
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "per_layer_config",
    "default_theta",
    "rope_local_base_freq",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "use_bidirectional_attention",
    "add_cross_attention",
    "is_encoder_decoder",
    "layer_types",
    "sliding_window_pattern",
}


def cases(model_type: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Changes of config.json, each with a name for messages."""
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    own = {field.name for field in dataclasses.fields(config)} | set(config.attribute_map)
    yield "nothing", {}
    for field, values in VALUES.items():
        for value in values if field in own or field in EVERYWHERE else ():
            if value is not MISSING:
                yield f"{field} = {value}", {field: value}
            elif field in BASES[model_type]:
                yield f"without {field}", {field: MISSING}
    yield "layers by a pattern", {"layer_types": MISSING, "sliding_window_pattern": 2}
    yield "layers by another pattern", {"layer_types": MISSING, "_sliding_window_pattern": 2}
    foreign = [field for field in VALUES if field not in own and field not in EVERYWHERE]
    yield "all foreign fields", {field: VALUES[field][0] for field in foreign}


@pytest.mark.parametrize("model_type", BASES)
def test_a_field_means_what_it_means_in_transformers_or_is_refused(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    input_ids = np.random.default_rng(0).integers(0, 40, LENGTH).astype(np.int32)
    wrong = []
    for number, (what, change) in enumerate(cases(model_type)):
        folder = tmp_path / str(number)
        folder.mkdir()
        values = {"model_type": model_type, **BASES[model_type], **change}
        values = {field: value for field, value in values.items() if value is not MISSING}
        (folder / "config.json").write_text(json.dumps(values))
        expected, found = theirs(folder, input_ids), ours(folder, input_ids)
        if isinstance(found, PellucidError):
            if what in ("nothing", "all foreign fields"):
                wrong.append(f"{what}: refused: {found}")
            continue
        if isinstance(expected, Exception):
            wrong.append(f"{what}: transformers refuses it: {str(expected)[:100]}")
            continue
        error = np.abs(found - expected).max() / np.abs(expected).max()
        if error > RELATIVE_BUDGET:
            wrong.append(f"{what}: logits differ by {error:.2g} of the largest")
    assert wrong == []


def test_every_field_of_every_config_class_is_tried() -> None:
    assert set(BASES) == {family.hf.model_type for family in FAMILIES}
    for model_type in BASES:
        config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
        fields = {field.name for field in dataclasses.fields(config)}
        assert fields - INERT - set(VALUES) == set(), model_type
