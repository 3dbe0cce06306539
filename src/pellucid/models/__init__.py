"""Models as declarations: which parameters there are, and the forward pass over them. Nothing here
knows files, arrays or backends.

One idea: families that differ in data (biases, norms of heads, windows, softcaps, RoPE) share one
file and differ in `ModelConfig`; a file of its own is for a graph of its own. `registry.py` maps a
config's architecture to its declaration and forward pass.

Imports only `ops`, `config` and `batch`.
"""

__all__: list[str] = []
