"""Makes the golden checkpoints of this folder: a tiny random Llama, quantized in each layout by the
library that defines it, and the logits that transformers computes with the library's own
dequantized weights.

    python tests/golden/quantized/make_golden.py SOURCES [NAME…]

SOURCES holds the unpacked source packages auto_gptq-0.7.1 and autoawq-0.2.9. Only the files that
pack are loaded from them, because the packages do not import without a GPU. compressed-tensors must
be installed. `golden.json` names the versions.

Each folder holds config.json, model.safetensors and expected.npz: input_ids [T] and logits [T, V].
Scales are float16, and the libraries' functions run in float32, so no product is rounded twice.
"""

import importlib
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import compressed_tensors
import numpy as np
import torch
import transformers
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import save_file

HERE = Path(__file__).parent
CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LENGTH = 40
# of a linear layer: parts by name, and its dequantized weight [out, in]
Packed = tuple[dict[str, torch.Tensor], torch.Tensor]


def build_model() -> transformers.LlamaForCausalLM:
    """Random weights, with attention away from uniform and norms away from 1."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
            parameter.copy_(parameter.half())
    return model


def linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            yield name, module


def fit_grid(
    weight: torch.Tensor, group_of: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales (numbers of float16) and zero points [out, groups] by the range of each group."""
    most = 2**bits - 1
    scales, zeros = [], []
    for group in range(int(group_of.max()) + 1):
        part = weight[:, group_of == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scale = ((high - low) / most).half().float()
        scales.append(scale)
        middle = torch.full_like(scale, 2 ** (bits - 1))
        # zero points from 1: the first GPTQ format cannot hold 0
        zeros.append(middle if sym else torch.round(-low / scale).clamp(1, most))
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def round_to_grid(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    group_of: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """The weight's nearest values on the grid, so that packing cannot round beyond its codes."""
    s, z = scales[:, group_of], zeros[:, group_of]
    return s * (torch.round(weight / s + z).clamp(0, 2**bits - 1) - z)


def gptq(
    sources: Path, *, bits: int, group_size: int, sym: bool, act_order: bool, v2: bool
) -> tuple[dict[str, Any], Callable[[torch.nn.Linear], Packed]]:
    """By AutoGPTQ's QuantLinear. The second format adds one to each zero point, as GPTQModel's
    convert_gptq_v1_to_v2_format does.
    """
    module = import_file(sources / "auto_gptq-0.7.1", "auto_gptq.nn_modules.qlinear.qlinear_cuda")

    def pack(linear: torch.nn.Linear) -> Packed:
        inputs, outputs = linear.in_features, linear.out_features
        group = torch.arange(inputs) // (inputs if group_size == -1 else group_size)
        if act_order:
            # layers with the same inputs have the same order
            group = group[torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))]
        scales, zeros = fit_grid(linear.weight.data, group, bits, sym)
        linear.weight.data = round_to_grid(linear.weight.data, scales, zeros, group, bits)
        packed = module.QuantLinear(
            bits, group_size, inputs, outputs, bias=False, weight_dtype=torch.float32
        )
        packed.pack(linear, scales, zeros.clone(), g_idx=group.to(torch.int32))
        packed.scales = packed.scales.float()
        weight = packed(torch.eye(inputs)).T
        parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "g_idx")}
        if v2:
            parts["qzeros"] = add_one_to_each(parts["qzeros"], bits)
        parts["scales"] = packed.scales.half()
        return parts, weight

    fields: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "desc_act": act_order,
        "sym": sym,
    }
    fields |= {"quant_method": "gptq", "checkpoint_format": "gptq_v2" if v2 else "gptq"}
    return fields | {"damp_percent": 0.01, "true_sequential": True}, pack


def add_one_to_each(qzeros: torch.Tensor, bits: int) -> torch.Tensor:
    """Zero points of the second format from those of the first: each row is one number with a one
    added at every code.
    """
    rows = []
    for row in qzeros.numpy().astype("<i4"):
        size = 32 * len(row)
        number = int.from_bytes(row.tobytes(), "little") + sum(1 << i for i in range(0, size, bits))
        rows.append(np.frombuffer(number.to_bytes(size // 8, "little"), "<i4"))
    return torch.from_numpy(np.stack(rows))


def awq(
    sources: Path, group_size: int
) -> tuple[dict[str, Any], Callable[[torch.nn.Linear], Packed]]:
    """By AutoAWQ's WQLinear_GEMM and its own dequantization."""
    module = import_file(sources / "autoawq-0.2.9", "awq.modules.linear.gemm")

    def pack(linear: torch.nn.Linear) -> Packed:
        group = torch.arange(linear.in_features) // group_size
        scales, zeros = fit_grid(linear.weight.data, group, 4, sym=False)
        linear.weight.data = round_to_grid(linear.weight.data, scales, zeros, group, 4)
        packed = module.WQLinear_GEMM.from_linear(
            linear, 4, group_size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous()
        )
        parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales")}
        weight = module.dequantize_gemm(
            parts["qweight"], parts["qzeros"], parts["scales"].float(), 4, group_size
        )
        return parts, weight.T

    fields = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    return fields | {"version": "gemm", "modules_to_not_convert": None}, pack


def compressed(
    format: str, weights: dict[str, Any], inputs: dict[str, Any] | None = None
) -> tuple[dict[str, Any], Callable[[torch.nn.Linear], Packed]]:
    """By the compressors of compressed-tensors."""
    args = QuantizationArgs(**weights)
    activations = None if inputs is None else QuantizationArgs(**inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations)
    compressor = BaseCompressor.get_value_from_registry(format)
    group_size = weights.get("group_size")

    def pack(linear: torch.nn.Linear) -> Packed:
        group = torch.arange(linear.in_features) // (group_size or linear.in_features)
        bits, symmetric = weights["num_bits"], weights["symmetric"]
        scales, zeros = fit_grid(linear.weight.data, group, bits, symmetric)
        if symmetric and bits == 8:
            scales = scales.mul(1.01).half().float()  # so that no code is beyond 127
        linear.weight.data = round_to_grid(linear.weight.data, scales, zeros, group, bits)
        state = {"weight": linear.weight.data, "weight_scale": scales}
        if not symmetric:
            state["weight_zero_point"] = (zeros - 2 ** (bits - 1)).to(torch.int8)
        parts = compressor.compress(state, scheme)
        weight = compressor.decompress(dict(parts), scheme)["weight"]
        return {**parts, "weight_scale": parts["weight_scale"].half()}, weight

    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    fields: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": ["lm_head"],
    }
    fields |= {"config_groups": {"group_0": {**group, "output_activations": None}}}
    return fields | {"kv_cache_scheme": None, "quantization_status": "compressed"}, pack


def import_file(package: Path, name: str) -> Any:
    """A module of a package whose own __init__ cannot run."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        parent = types.ModuleType(".".join(parts[:depth]))
        parent.__path__ = [str(package.joinpath(*parts[:depth]))]
        sys.modules.setdefault(parent.__name__, parent)
    return importlib.import_module(name)


def make(name: str, fields: dict[str, Any], pack: Callable[[torch.nn.Linear], Packed]) -> None:
    model = build_model()
    tensors: dict[str, torch.Tensor] = {}
    modules = dict(linear_layers(model))
    for module, linear in modules.items():
        parts, weight = pack(linear)
        tensors |= {f"{module}.{part}": value.contiguous() for part, value in parts.items()}
        linear.weight.data = weight.float().contiguous()
    for tensor, value in model.state_dict().items():
        if tensor.removesuffix(".weight") not in modules:
            tensors[tensor] = value.half().contiguous()
    ids = torch.randint(0, CONFIG["vocab_size"], (1, LENGTH))
    with torch.no_grad():
        logits = model(ids).logits[0]
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = model.config.to_dict() | {"quantization_config": fields, "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    np.savez_compressed(
        folder / "expected.npz", input_ids=ids[0].numpy().astype(np.int32), logits=logits.numpy()
    )


def main() -> None:
    sources, *names = sys.argv[1:]
    at = Path(sources)
    of_tokens = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
    w4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    w3 = {**w4, "num_bits": 3, "symmetric": True}
    w8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    plain = {"act_order": False, "v2": False}
    golden = {
        "gptq-int4-g32": lambda: gptq(at, bits=4, group_size=32, sym=True, **plain),
        "gptq-int4-g32-actorder": lambda: gptq(
            at, bits=4, group_size=32, sym=False, act_order=True, v2=False
        ),
        "gptq-int3-g32-v2": lambda: gptq(
            at, bits=3, group_size=32, sym=False, act_order=False, v2=True
        ),
        "gptq-int2-g64": lambda: gptq(at, bits=2, group_size=64, sym=False, **plain),
        "gptq-int8-rows": lambda: gptq(at, bits=8, group_size=-1, sym=True, **plain),
        "awq-int4-g32": lambda: awq(at, 32),
        "compressed-w4a16": lambda: compressed("pack-quantized", {**w4, "symmetric": True}),
        "compressed-w4a16-asym": lambda: compressed("pack-quantized", {**w4, "symmetric": False}),
        "compressed-w3a16": lambda: compressed("pack-quantized", w3),
        "compressed-w8a16": lambda: compressed("pack-quantized", w8),
        "compressed-w8a8": lambda: compressed("int-quantized", w8, {**of_tokens, "dynamic": True}),
    }
    for name in names or golden:
        fields, pack = golden[name]()
        make(name, fields, pack)
        print(name)
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "compressed-tensors": compressed_tensors.__version__,
        "auto-gptq": "0.7.1",
        "autoawq": "0.2.9",
    }
    (HERE / "golden.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
