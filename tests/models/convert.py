"""A golden Hugging Face checkpoint -> the GGUF file that llama.cpp's converter would write, without
a tokenizer.

Written from the converter's rules on arrays of values, and on purpose not with the package's names
and folds, which it is there to test: q and k of Llama and Mistral are reordered to the interleaved
RoPE layout, Conv1D is transposed, Gemma's norm weights get their 1, and llama3's scaling becomes
factors. Two keys go beyond the converter, which drops what they say: Mistral's windows and Gemma
3's layer types.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pellucid.formats import dequantize, encode_dense, get_format, quantize
from pellucid.formats.tensor import HostTensor
from pellucid.weights.gguf_writer import write_gguf
from pellucid.weights.safetensors_file import SafetensorsFile

__all__ = ["convert"]

# model_type -> GGUF's name, where they differ
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}
NAMES = {  # in the order in which they are tried
    "model.": "",
    "transformer.": "",
    "embed_tokens.": "token_embd.",
    "wte.": "token_embd.",
    "wpe.": "position_embd.",
    "ln_f.": "output_norm.",
    "lm_head.": "output.",
    "layers.": "blk.",
    "h.": "blk.",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
}


def convert(folder: Path, path: Path, weights: str = "F32") -> None:
    """Write the model in `folder` to the GGUF file `path`, matrices in the format `weights` where
    their rows are whole blocks of it.
    """
    config = json.loads((folder / "config.json").read_text())
    arrays = {
        name: array
        for file in sorted(folder.glob("*.safetensors"))
        for name, array in _read(file).items()
    }
    tensors = dict(_convert(config, name, array) for name, array in arrays.items())
    if config.get("rope_parameters", {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _llama3_factors(config)
    if config.get("rope_parameters", {}).get("rope_type") == "longrope":
        for length in ("short", "long"):
            factors = np.array(config["rope_parameters"][f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = factors
    write_gguf(
        path,
        _metadata(config),
        ((name, _encode(array, weights)) for name, array in tensors.items()),
    )


def _encode(array: NDArray[np.float32], weights: str) -> HostTensor:
    blocks = (
        weights != "F32"
        and array.ndim == 2
        and array.shape[-1] % get_format(weights).block_size == 0
    )
    return quantize(array, weights) if blocks else encode_dense(array)


def _read(file: Path) -> dict[str, NDArray[np.float32]]:
    opened = SafetensorsFile.open(file)
    return {name: dequantize(opened.tensor(name)) for name in opened.specs}


def _convert(
    config: dict[str, Any], name: str, array: NDArray[np.float32]
) -> tuple[str, NDArray[np.float32]]:
    family = config["model_type"]
    if family in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
        heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        halves = array.reshape(heads, 2, -1, *array.shape[1:])  # [H, 2, D/2, ...]
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if family == "gpt2" and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        array = array.T
    if family.startswith("gemma") and name.endswith("norm.weight"):
        array = array + np.float32(1)
    for theirs, gguf in NAMES.items():
        name = name.replace(theirs, gguf)
    name = name.replace(
        "post_attention_layernorm",
        "post_attention_norm" if family.startswith("gemma") else "ffn_norm",
    )
    return "output_norm.weight" if name == "norm.weight" else name, array


def _llama3_factors(config: dict[str, Any]) -> NDArray[np.float32]:
    rope, dim = config["rope_parameters"], config["head_dim"]
    low, high, context = (
        rope["low_freq_factor"],
        rope["high_freq_factor"],
        rope["original_max_position_embeddings"],
    )
    factors = []
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / dim)
        if wavelength < context / high:
            factors.append(1.0)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)


def _metadata(config: dict[str, Any]) -> dict[str, object]:
    family = config["model_type"]
    arch = ARCHITECTURES.get(family, family)
    if family == "gpt2":
        values: dict[str, object] = {
            "block_count": config["n_layer"],
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": 4 * config["n_embd"],
            "attention.head_count": config["n_head"],
            "attention.layer_norm_epsilon": config["layer_norm_epsilon"],
        }
        return {
            "general.architecture": arch,
            **{f"{arch}.{key}": value for key, value in values.items()},
        }
    rope = config["rope_parameters"]
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": whole["rope_theta"],
    }
    if "head_dim" in config:
        values |= {
            "attention.key_length": config["head_dim"],
            "attention.value_length": config["head_dim"],
        }
    if whole["rope_type"] in ("linear", "yarn"):
        values |= {"rope.scaling.type": whole["rope_type"], "rope.scaling.factor": whole["factor"]}
    if whole["rope_type"] == "yarn":
        values |= {
            "rope.scaling.original_context_length": whole["original_max_position_embeddings"]
        }
        values |= {
            "rope.scaling.yarn_beta_fast": whole["beta_fast"],
            "rope.scaling.yarn_beta_slow": whole["beta_slow"],
        }
    if local is not None:
        values |= {"rope.freq_base_swa": local["rope_theta"]}
    if family in ("mistral", "gemma2", "gemma3_text", "phi3"):
        values |= {"attention.sliding_window": config["sliding_window"] or 0}
    if family == "phi3":
        values |= _phi3_metadata(config)
    if family == "gemma3_text":
        values |= {
            "attention.sliding_window_pattern": [
                t == "sliding_attention" for t in config["layer_types"]
            ]
        }
    if family == "gemma2":
        values |= {
            f"{cap}_softcapping": config[f"{cap}_softcapping"]
            for cap in ("attn_logit", "final_logit")
        }
    return {
        "general.architecture": arch,
        **{f"{arch}.{key}": value for key, value in values.items()},
    }


def _phi3_metadata(config: dict[str, Any]) -> dict[str, object]:
    rope, original = config["rope_parameters"], config["original_max_position_embeddings"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    values: dict[str, object] = {
        "rope.dimension_count": int(head_dim * rope["partial_rotary_factor"]),
        "rope.scaling.original_context_length": original,
    }
    if rope["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / original
        values["rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
    return values
