"""Models as declarations: which parameters there are, and the forward pass over them. Nothing here
knows files, arrays or backends.

Families that differ in data (biases, norms of heads, windows, softcaps, RoPE) share one graph and
differ in `ModelConfig`; a file of its own is for a graph of its own. `registry.py` maps a config's
graph to its declaration and its three parts.

Imports only `ops`, `config` and `batch`.
"""

__all__: list[str] = []
