"""Makes the golden checkpoints of this folder: a tiny random model of every family, and the logits
that transformers computes with it.

    python tests/golden/models/make_golden.py [MODEL…]

Each folder holds what `save_pretrained` writes (config.json and safetensors) and `expected.npz`:
input_ids [T] and logits [T, V], float32. Weights are random but lively: norm weights away from 1,
biases away from 0, attention away from uniform, so that a weight left out, swapped or folded
wrongly shows in the logits. Sequences are longer than the sliding windows and than the contexts
that RoPE is stretched from. `golden.json` names the versions that each came from.
"""

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

__all__ = ["FAMILIES", "build_model", "compute_logits"]

LENGTH = 40  # tokens of each input
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GEMMA: dict[str, Any] = {
    **SIZES,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "sliding_window": 8,
    "num_hidden_layers": 3,
}
THETA = 10_000.0

# name -> config, and how it is saved
FAMILIES: dict[str, tuple[transformers.PretrainedConfig, dict[str, Any]]] = {
    "gpt2": (
        GPT2Config(
            n_embd=32,
            n_head=4,
            n_layer=2,
            n_positions=64,
            vocab_size=96,
            bos_token_id=None,
            eos_token_id=None,
        ),
        {},
    ),
    "llama": (LlamaConfig(**SIZES), {"max_shard_size": "32KB"}),
    "llama-bias-linear": (
        LlamaConfig(
            **SIZES,
            attention_bias=True,
            mlp_bias=True,
            rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": THETA},
        ),
        {},
    ),
    "llama3": (
        LlamaConfig(
            **SIZES,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        ),
        {},
    ),
    "llama-yarn": (
        LlamaConfig(
            **SIZES,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "beta_fast": 2.0,
                "beta_slow": 0.2,
            },
        ),
        {},
    ),
    "mistral": (MistralConfig(**SIZES, sliding_window=8, tie_word_embeddings=True), {}),
    "qwen2": (
        Qwen2Config(
            **SIZES,
            use_sliding_window=True,
            sliding_window=8,
            max_window_layers=1,
            tie_word_embeddings=True,
        ),
        {},
    ),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True), {}),
    "gemma2": (Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0), {}),
    "gemma3": (
        Gemma3TextConfig(
            **GEMMA,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1_000_000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        ),
        {"dtype": torch.bfloat16},
    ),
    "phi3": (
        Phi3Config(
            **SIZES,
            sliding_window=8,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": THETA,
                "partial_rotary_factor": 0.5,
            },
        ),
        {},
    ),
    "phi3-longrope": (
        Phi3Config(
            **SIZES,
            original_max_position_embeddings=48,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": THETA,
                "short_factor": [1.0, 1.5, 2.0, 4.0],
                "long_factor": [1.0, 3.0, 9.0, 27.0],
            },
        ),
        {},
    ),
}


def build_model(
    config: transformers.PretrainedConfig, seed: int, dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    """A model with lively random weights that `dtype` holds exactly, computing in float32."""
    config = copy.deepcopy(config)  # saving a model writes its dtype there
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    gemma = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(
                    noise * parameter.shape[0 if config.model_type == "gpt2" else 1] ** -0.5 * 1.5
                )
            elif name.endswith("bias"):
                parameter.copy_(noise * 0.3)
            else:  # the weight of a norm: a factor of w, Gemma's of 1 + w
                parameter.copy_(noise * 0.3 + (0.0 if gemma else 1.0))
            # parameters alone: buffers such as inv_freq stay float32
            parameter.copy_(parameter.to(dtype))
    return model


def compute_logits(model: transformers.PreTrainedModel, input_ids: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one sequence [T], in one pass."""
    with torch.no_grad():
        logits: torch.Tensor = model(torch.from_numpy(input_ids).long()[None]).logits[0]
    return logits.float().numpy()


def main() -> None:
    """Make all models, or those that the command line names."""
    here = Path(__file__).parent
    file = here / "golden.json"
    stamps = json.loads(file.read_text())
    stamp = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }
    for seed, (name, (config, how)) in enumerate(FAMILIES.items()):
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        folder = here / name
        shutil.rmtree(folder, ignore_errors=True)
        dtype = how.get("dtype", torch.float32)
        model = build_model(config, seed, dtype)
        input_ids = (
            np.random.default_rng(seed).integers(0, config.vocab_size, LENGTH).astype(np.int32)
        )
        logits = compute_logits(model, input_ids)
        model.to(dtype).save_pretrained(
            folder, **{key: value for key, value in how.items() if key != "dtype"}
        )
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "expected.npz", input_ids=input_ids, logits=logits)
        print(
            f"{name:20} {sum(p.numel() for p in model.parameters()):7} parameters, largest logit "
            f"{np.abs(logits).max():.2f}"
        )
        stamps[name] = stamp
    file.write_text(json.dumps(stamps, indent=2) + "\n")


if __name__ == "__main__":
    main()
