"""Models without weights for tests of type maps: names and shapes of tensors, and metadata."""

from dataclasses import dataclass

from pellucid.formats.tensor import TensorSpec
from pellucid.quant.type_map import ModelFacts

ROWS = 2  # of each matrix: a type map does not depend on it


@dataclass(frozen=True)
class Described:
    """A model whose weights have `columns` and, in ffn_down, `down_columns` columns."""

    facts: ModelFacts
    columns: int
    down_columns: int
    tied: bool = True
    fused: bool = False

    def tensors(self) -> dict[str, TensorSpec]:
        columns = {"token_embd": self.columns, "position_embd": self.columns}
        if not self.tied:
            columns["output"] = self.columns
        attention = ["attn_qkv"] if self.fused else ["attn_q", "attn_k", "attn_v"]
        for layer in range(self.facts.num_layers):
            for module in (*attention, "attn_output", "ffn_gate", "ffn_up"):
                columns[f"blk.{layer}.{module}"] = self.columns
            columns[f"blk.{layer}.ffn_down"] = self.down_columns
        found = {f"{n}.weight": TensorSpec("F32", (ROWS, c)) for n, c in columns.items()}
        for layer in range(self.facts.num_layers):
            found[f"blk.{layer}.attn_norm.weight"] = TensorSpec("F32", (self.columns,))
            found[f"blk.{layer}.attn_q.bias"] = TensorSpec("F32", (self.columns,))
        return found

    def metadata(self) -> dict[str, object]:
        name, facts = self.facts.architecture, self.facts
        return {
            "general.architecture": name,
            f"{name}.context_length": 512,
            f"{name}.embedding_length": 64 * facts.num_heads,
            f"{name}.block_count": facts.num_layers,
            f"{name}.feed_forward_length": 256,
            f"{name}.attention.head_count": facts.num_heads,
            f"{name}.attention.head_count_kv": facts.num_kv_heads,
            f"{name}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{name}.attention.layer_norm_epsilon": 1e-5,
            f"{name}.attention.sliding_window": 512,
            f"{name}.rope.dimension_count": 64,
        }


MODELS = {
    "large": Described(ModelFacts("llama", 32, 32, 8), 256, 512, tied=False),
    "small": Described(ModelFacts("llama", 22, 4, 4), 256, 768),
    "70b": Described(ModelFacts("llama", 80, 64, 8), 256, 256, tied=False),
    "65b": Described(ModelFacts("llama", 80, 64, 64), 256, 256, tied=False),
    "qwen of 80 layers": Described(ModelFacts("qwen2", 80, 64, 8), 256, 256, tied=False),
    "narrow": Described(ModelFacts("qwen2", 24, 14, 2), 288, 512),
    "narrow down": Described(ModelFacts("qwen2", 28, 12, 2), 512, 96),
    "odd": Described(ModelFacts("llama", 7, 3, 3), 48, 80, tied=False),
    "fused": Described(ModelFacts("phi3", 32, 32, 32), 256, 256, tied=False, fused=True),
    "positions": Described(ModelFacts("gpt2", 12, 12, 12), 256, 256, fused=True),
    "gemma": Described(ModelFacts("gemma3", 18, 4, 1), 320, 1024),
}
