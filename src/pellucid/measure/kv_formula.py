"""The formula of a model's KV cache bytes per token, written out with its numbers.

    per layer = KV heads · (bytes of a key + bytes of a value)

MHA has a KV head for each query head, GQA one for several (Ainslie et al., arXiv:2305.13245), MQA
one for all (Shazeer, arXiv:1911.02150). A layer with a sliding window keeps only its last tokens.
MLA keeps one latent vector per token in place of keys and values (DeepSeek-V2, arXiv:2405.04434).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from ..config import ModelConfig
from ..errors import ConfigError, FormatError
from ..kv.layout import KVLayout

__all__ = ["KV_ALIASES", "LatentCache", "kv_formula", "read_latent_cache"]

# Other names of KV cache dtypes. bf16 takes as many bytes as f16.
KV_ALIASES = {
    "bf16": "f16",
    "bfloat16": "f16",
    "fp16": "f16",
    "float16": "f16",
    "fp32": "f32",
    "float32": "f32",
}
_NUMBER_BYTES = {"f16": 2, "f32": 4}
MAX_LATENT = 1 << 20


def kv_formula(config: ModelConfig, layout: KVLayout, names: tuple[str, str]) -> list[str]:
    """A line for each kind of layers. `names` are the dtypes of keys and values as they were asked
    for.
    """
    heads, kv_heads = config.num_heads, config.num_kv_heads
    kind = (
        "MHA"
        if heads == kv_heads
        else f"MQA, {heads} query heads share one KV head"
        if kv_heads == 1
        else f"GQA, {heads // kv_heads} query heads share a KV head"
    )
    shown_heads = f"{kv_heads} KV head{'s' if kv_heads > 1 else ''}"
    lines = []
    for window in dict.fromkeys(spec.window for spec in layout.specs):
        layers = [i for i, spec in enumerate(layout.specs) if spec.window == window]
        each = layout.token_bytes[layers[0]]
        dtypes = layout.specs[layers[0]].k_dtype, layout.specs[layers[0]].v_dtype
        size = _NUMBER_BYTES.get(dtypes[0])
        if dtypes[0] == dtypes[1] and size is not None:
            widths = f"{shown_heads} · {config.head_dim} numbers · {size} bytes ({names[0]})"
            product = f"2 (key and value) · {len(layers)} layers · {widths}"
        else:
            scales = f"{', '.join(dict.fromkeys(names))}, with scales"
            product = (
                f"{len(layers)} layers · {shown_heads} · {each // kv_heads} bytes of a key "
                f"and a value ({scales})"
            )
        seen = "" if window is None else f", for the last {window:,} tokens at most"
        lines.append(f"{kind}: {product} = {each * len(layers):,} bytes per token{seen}")
    return lines


@dataclass(frozen=True, slots=True)
class LatentCache:
    """What a layer of multi-head latent attention keeps per token."""

    architecture: str
    num_layers: int
    kv_lora_rank: int
    rope_dim: int
    number_bytes: int = 2
    dtype: str = "bf16"

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * (self.kv_lora_rank + self.rope_dim) * self.number_bytes

    @property
    def formula(self) -> str:
        return (
            f"MLA: {self.num_layers} layers · ({self.kv_lora_rank} numbers of the latent + "
            f"{self.rope_dim} of the rotary key) · {self.number_bytes} bytes ({self.dtype}) = "
            f"{self.bytes_per_token:,} bytes per token"
        )


def read_latent_cache(
    values: Mapping[str, object], kv_dtype: str, where: str
) -> LatentCache | None:
    """The cache of a DeepSeek-like config.json; None where it has no `kv_lora_rank`. Raises
    FormatError for sizes that are not positive integers.
    """
    if not isinstance(values.get("kv_lora_rank"), int):
        return None
    sizes = []
    for name in ("num_hidden_layers", "kv_lora_rank", "qk_rope_head_dim"):
        size = values.get(name)
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= MAX_LATENT:
            raise FormatError(
                f"{where}: {name} is {str(size)[:40]!r}; it must be a positive integer"
            )
        sizes.append(size)
    plain = "bf16" if kv_dtype == "auto" else kv_dtype
    number_bytes = _NUMBER_BYTES.get(KV_ALIASES.get(plain, plain))
    if number_bytes is None:
        raise ConfigError(
            f"kv_dtype is {kv_dtype!r}; a latent cache is planned as bf16, f16 or f32"
        )
    layers, rank, rope = sizes
    return LatentCache(str(values.get("model_type"))[:100], layers, rank, rope, number_bytes, plain)
