"""The inverse of a plan: files of every family, written from what the other kind of file loads."""

from pathlib import Path

import numpy as np
import pytest

from pellucid.formats import dequantize
from pellucid.formats.tensor import HostTensor
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.families import SourceOf, gguf_source_of, hf_source_of
from pellucid.weights.gguf_checkpoint import GGUFCheckpoint
from pellucid.weights.safetensors_file import SafetensorsFile
from pellucid.weights.unfold import file_tensors

from ..models.convert import convert
from ..models.harness import GOLDEN, GOLDEN_NAMES


def _written(path: Path, source_of: SourceOf) -> dict[str, HostTensor]:
    """The tensors of a file, made from the parameters of the model at `path`."""
    with open_checkpoint(path) as checkpoint:
        tensors = file_tensors(checkpoint.config, source_of)
        parameters = dict(checkpoint.parameters())
        made = {name: tensor.build(parameters) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            assert made[name].shape == tensor.shape
            assert made[name].format == tensor.format(checkpoint.specs())
        return made


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_gguf_tensors_from_a_folder(name: str, tmp_path: Path) -> None:
    convert(GOLDEN / name, tmp_path / "model.gguf")
    with GGUFCheckpoint.open(tmp_path / "model.gguf") as expected:
        made = _written(GOLDEN / name, gguf_source_of(expected.config.architecture))
        names = set(expected.gguf.tensors)
        assert names - set(made) <= {
            *("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
        }
        for tensor, values in made.items():
            theirs = expected.gguf.tensor(tensor)
            assert np.array_equal(dequantize(values), dequantize(theirs)), tensor


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_folder_tensors_from_a_gguf_file(name: str, tmp_path: Path) -> None:
    convert(GOLDEN / name, tmp_path / "model.gguf")
    with open_checkpoint(GOLDEN / name) as folder:
        made = _written(tmp_path / "model.gguf", hf_source_of(folder.config.architecture))
    for file in sorted((GOLDEN / name).glob("*.safetensors")):
        expected = SafetensorsFile.open(file)
        for tensor in expected.specs:
            values = dequantize(expected.tensor(tensor))
            # 1 + w is rounded, and so is the way back
            atol = 2e-7 if name.startswith("gemma") and tensor.endswith("norm.weight") else 0.0
            assert np.allclose(dequantize(made.pop(tensor)), values, rtol=0, atol=atol), tensor
    assert not made
