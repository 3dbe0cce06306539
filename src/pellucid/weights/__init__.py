"""Bytes on disk ↔ parameters: GGUF and safetensors files, their configs, their names, and the folds
that mend weights at load.

One idea: the models' declaration leads. A checkpoint is opened by reading its config, asking the
architecture which parameters that implies, and holding the file to it: each declared tensor is
there under its name and shape, and nothing else is.
"""

__all__: list[str] = []
