"""Read a model's tensors without running it: names, shapes, formats, and decoded numbers.

python examples/tensors.py [MODEL]
"""

import sys

import numpy as np

from pellucid.formats import dequantize
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.hub import resolve_model


def main(model: str = "smollm2-135m-instruct") -> None:
    path = resolve_model(model, progress=True)
    with open_checkpoint(path) as checkpoint:
        print(f"{checkpoint.config.architecture}, {checkpoint.config.num_layers} layers")
        for name, tensor in checkpoint.parameters():
            if not name.startswith(("layers.0.", "embed", "norm")):
                continue
            values = dequantize(tensor)  # float32, whatever the file's format
            spread = f"std {np.std(values):.4f}, largest {np.abs(values).max():.3f}"
            print(f"{name:32} {tensor.format:6} {list(tensor.shape)!s:16} {spread}")


if __name__ == "__main__":
    main(*sys.argv[1:])
