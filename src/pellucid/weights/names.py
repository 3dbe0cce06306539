"""Where each declared parameter lies in a file: canonical names ↔ the names of GGUF and of Hugging
Face.

One idea: the declaration leads. For each `Param` this module says which tensor of the file holds
it, under which shape, and which fold makes it canonical; what the file holds beyond that is
unexpected. So a tensor is never guessed from its name, and none is passed over.
"""

from ..config import ModelConfig
from ..models.params import Param
from .folds import AddOne, InterleavedToHalfSplit, SliceOutputs, Transpose
from .plan import ParamSource

__all__ = ["gguf_source", "safetensors_source"]

_GGUF_TOP = {
    "embed_tokens": "token_embd",
    "embed_positions": "position_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
_GGUF_LAYER = {
    "input_norm": "attn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o_proj": "attn_output",
    "post_attn_norm": "post_attention_norm",
    "pre_mlp_norm": "ffn_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "post_mlp_norm": "post_ffw_norm",
}
_HF_TOP = {"embed_tokens": "model.embed_tokens", "norm": "model.norm", "lm_head": "lm_head"}
_HF_LAYER = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o_proj": "self_attn.o_proj",
    "pre_mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
_HF_SANDWICH = {  # Gemma 2 and 3: here post_attention_layernorm is what its name says
    "post_attn_norm": "post_attention_layernorm",
    "pre_mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_HF_GPT2_TOP = {"embed_tokens": "wte", "embed_positions": "wpe", "norm": "ln_f"}
_HF_GPT2_LAYER = {
    "input_norm": "ln_1",
    "o_proj": "attn.c_proj",
    "pre_mlp_norm": "ln_2",
    "up_proj": "mlp.c_fc",
    "down_proj": "mlp.c_proj",
}
_QKV = ("q_proj", "k_proj", "v_proj")


def gguf_source(config: ModelConfig, param: Param) -> ParamSource:
    """Where a GGUF file holds `param`.

    Files of architecture "llama" (Mistral's too) hold the rows of q and k in the interleaved RoPE
    layout; no other family here does. GPT-2's q, k and v are one tensor. Gemma's norm weights have
    their 1 added already.
    """
    layer, module, kind = _split(param.name)
    if layer is None:
        return ParamSource({f"{_GGUF_TOP[module]}.{kind}": param.shape})
    if config.architecture == "gpt2" and module in _QKV:
        start, stop, total = _qkv_rows(config, module)
        fused = {f"blk.{layer}.attn_qkv.{kind}": (total, *param.shape[1:])}
        return ParamSource(fused, SliceOutputs(start, stop))
    source = f"blk.{layer}.{_GGUF_LAYER[module]}.{kind}"
    if config.architecture == "llama" and module in ("q_proj", "k_proj"):
        heads = config.num_heads if module == "q_proj" else config.num_kv_heads
        return ParamSource({source: param.shape}, InterleavedToHalfSplit(heads))
    return ParamSource({source: param.shape})


def safetensors_source(
    config: ModelConfig, param: Param, prefix: str = "transformer."
) -> ParamSource:
    """Where a Hugging Face checkpoint holds `param`. `prefix` is GPT-2's own: "transformer." or
    nothing, as the file has it.
    """
    layer, module, kind = _split(param.name)
    if config.architecture == "gpt2":
        return _gpt2_source(config, param, prefix)
    if layer is None:
        source = f"{_HF_TOP[module]}.{kind}"
    else:
        gemma = config.architecture in ("gemma2", "gemma3")
        source = f"model.layers.{layer}.{(_HF_LAYER | _HF_SANDWICH if gemma else _HF_LAYER)[module]}.{kind}"
    adds_one = config.architecture in ("gemma2", "gemma3") and module.endswith("norm")
    return ParamSource({source: param.shape}, AddOne() if adds_one else None)


def _gpt2_source(config: ModelConfig, param: Param, prefix: str) -> ParamSource:
    """GPT-2's linear layers are Conv1D: weights are [in, out], and q, k and v are one of them."""
    layer, module, kind = _split(param.name)
    if module == "lm_head":
        return ParamSource({"lm_head.weight": param.shape})
    if layer is None:
        return ParamSource({f"{prefix}{_HF_GPT2_TOP[module]}.{kind}": param.shape})
    if module in _QKV:
        start, stop, total = _qkv_rows(config, module)
        source = f"{prefix}h.{layer}.attn.c_attn.{kind}"
        if kind == "bias":
            return ParamSource({source: (total,)}, SliceOutputs(start, stop))
        return ParamSource({source: (config.hidden_size, total)}, Transpose(start, stop))
    source = f"{prefix}h.{layer}.{_HF_GPT2_LAYER[module]}.{kind}"
    if len(param.shape) == 2:
        return ParamSource({source: param.shape[::-1]}, Transpose())
    return ParamSource({source: param.shape})


def _qkv_rows(config: ModelConfig, module: str) -> tuple[int, int, int]:
    """Which rows of the fused matrix are `module`'s, and how many there are: q, k, v in turn."""
    sizes = [
        heads * config.head_dim
        for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    ]
    start = sum(sizes[: _QKV.index(module)])
    return start, start + sizes[_QKV.index(module)], sum(sizes)


def _split(name: str) -> tuple[int | None, str, str]:
    """ "layers.3.q_proj.weight" -> (3, "q_proj", "weight"); "norm.weight" -> (None, "norm",
    "weight").
    """
    *head, module, kind = name.split(".")
    return (int(head[1]) if head else None), module, kind
