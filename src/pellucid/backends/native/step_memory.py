"""The memory that a step of a model will take, before anything is loaded.

The forward pass is captured over the declarations of its weights and caches, and planned by the
code that plans real runs. The kernels report what they need beside the buffers. Sizes are in bytes.
"""

from ... import _native
from ...formats import get_format
from ...ops.backend import Forward
from .capture import Entry, capture, kv_spec_of, spec_of
from .plan import place_symbols

__all__ = ["step_bytes"]


def step_bytes(
    forward: Forward, isa: str, threads: int, num_tokens: int, num_logits: int, context: int
) -> dict[str, int]:
    """Bytes that a step of `num_tokens` tokens takes, by purpose, if no request is longer than
    `context` tokens.
    """
    captured = capture(forward)
    entries = captured.entries
    _, _, bytes_per_token = place_symbols(captured)
    capacity = -(-num_tokens // 16) * 16  # csrc/program.cpp, make_room
    scratch = max((_scratch_bytes(entry, isa) for entry in entries), default=0)
    partials = max(
        (_partial_bytes(e, isa, threads, num_tokens, context) for e in entries), default=0
    )
    memory = {
        "activations": bytes_per_token * capacity,
        "logits": num_logits * captured.result.width * 4,
        f"scratch of {threads} threads": threads * scratch,
        "partial results of attention": partials,
    }
    if captured.hidden is not None:
        memory["hidden states"] = num_tokens * captured.hidden.width * 4
    return memory


def _scratch_bytes(entry: Entry, isa: str) -> int:
    """The scratch memory of each thread."""
    if entry.op == "linear" and entry.weight is not None:
        spec = spec_of(entry.weight)
        quantized = get_format(spec.format).block_size > 1
        return _native.linear_scratch_bytes(spec.shape[1]) if quantized else 0
    if entry.op == "attention" and entry.kv is not None:
        spec_kv = kv_spec_of(entry.kv)
        return _native.attention_scratch_bytes(isa, spec_kv.num_kv_heads, spec_kv.k_dim)
    return 0


def _partial_bytes(entry: Entry, isa: str, threads: int, num_tokens: int, context: int) -> int:
    """Partial results of attention. Attention of a few rows over a long context is divided by
    splits of the context too, and the partial results are kept until they are merged.
    """
    if entry.op != "attention":
        return 0
    heads, head_dim = entry.attributes["heads"], entry.attributes["head_dim"]
    assert isinstance(heads, int) and isinstance(head_dim, int)
    return _native.attention_partials_bytes(isa, threads, heads, head_dim, num_tokens, context)
