"""Bytes on disk ↔ parameters: GGUF and safetensors files, the model families in them, and the folds
that mend weights at load.

The models' declaration leads. A checkpoint is opened by reading its config, asking the graph which
parameters that implies, and holding the file to it: each declared tensor is there under its name
and shape, and nothing else is.
"""

__all__: list[str] = []
