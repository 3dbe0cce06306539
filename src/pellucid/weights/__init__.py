"""Bytes on disk ↔ parameters: GGUF and safetensors files, the model families in them, and the folds
that change weights at load.

Opening a checkpoint reads its config, asks the graph which parameters that config implies, and
checks the file against this declaration: each declared tensor must be there with its name and
shape, and no other tensor may be.
"""

__all__: list[str] = []
