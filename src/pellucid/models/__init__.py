"""Models as declarations: their parameters, and the forward pass over them. This room knows no
files, arrays or backends.

Families that differ only in data (biases, norms of heads, windows, softcaps, RoPE) share one graph,
and their `ModelConfig`s differ. Each graph has a file. `registry.py` maps the name of a graph to
its declaration and its three parts.

This room imports only `ops`, `config` and `batch`.
"""

__all__: list[str] = []
