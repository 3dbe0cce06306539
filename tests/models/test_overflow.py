"""A model whose weights are finite and whose activations are not: every calibrated method refuses
it in one sentence, without a warning of NumPy's.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pellucid.errors import FormatError
from pellucid.formats import dequantize, encode_dense
from pellucid.quant.folder_model import FolderModel
from pellucid.quant.folder_types import FolderType, find_folder_type
from pellucid.quant.gradients import Gradients
from pellucid.quant.imatrix import collect_imatrix
from pellucid.quant.method import feedback_method
from pellucid.quant.quantize import plan_quantization, write_quantized
from pellucid.quant.sequential import source_loader
from pellucid.quant.source import Source, open_source
from pellucid.quant.type_map import find_file_type
from pellucid.quant.writers import plan_folder
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

from .convert import convert
from .harness import GOLDEN
from .test_written_folders import windows


@pytest.fixture
def source(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Source]:
    """Some tensors are multiplied by a factor."""
    pattern, factor = request.param
    convert(GOLDEN / "llama", tmp_path / "plain.gguf")
    with GGUFFile.open(tmp_path / "plain.gguf") as file:
        values = {name: dequantize(file.tensor(name)) for name in file.tensors}
        for name in values:
            if pattern in name:
                values[name] = values[name] * np.float32(factor)
        tensors = [(name, encode_dense(value)) for name, value in values.items()]
        write_gguf(tmp_path / "model.gguf", file.metadata, tensors)
    with open_source(tmp_path / "model.gguf") as opened:
        yield opened


@pytest.fixture
def text() -> np.ndarray:
    return windows(GOLDEN / "llama")


def folder_type(name: str) -> FolderType:
    found = find_folder_type(name)
    assert found is not None
    return found


# the product of gate and up is beyond float32
OVERFLOW = pytest.mark.parametrize("source", [("ffn_norm", 1e25)], indirect=True)


@OVERFLOW
@pytest.mark.parametrize(
    "kind", ["gptq-int4-g32", "gptq-int4-g32-actorder", "awq-int4-g32", "w8a8"]
)
def test_folders_refuse_activations_that_overflow(
    source: Source, text: np.ndarray, kind: str
) -> None:
    wanted, model = folder_type(kind), FolderModel(source.checkpoint)
    plan = plan_folder(model, wanted.layout)
    with pytest.raises(FormatError, match=r"layer.*0.* is NaN or infinite"):
        list(wanted.quantize(model, plan, text))


@OVERFLOW
def test_gguf_files_refuse_activations_that_overflow(
    source: Source, text: np.ndarray, tmp_path: Path
) -> None:
    plan = plan_quantization(source, find_file_type("q4_0"), is_calibrated=True)
    encode = feedback_method(text).encode(source, plan)
    with pytest.raises(FormatError, match=r"layer.*0.*NaN or infinite"):
        list(write_quantized(source, tmp_path / "out.gguf", plan, encode=encode))
    with pytest.raises(FormatError, match=r"layers\.0\..*NaN or infinite"):
        collect_imatrix(source.checkpoint, text, "text")
    with pytest.raises(FormatError, match="output of layer 0 is NaN or infinite"):
        Gradients(source.config, source_loader(source), text)


@pytest.mark.parametrize("source", [("ffn_up", 1e30)], indirect=True)
@pytest.mark.parametrize("kind", ["gptq-int4-g-1", "awq-int4-g32", "w8a8", "int8"])
def test_a_weight_that_is_too_large_is_named(source: Source, kind: str) -> None:
    wanted, model = folder_type(kind), FolderModel(source.checkpoint)
    plan = plan_folder(model, wanted.layout)
    with pytest.raises(FormatError, match=r"tensor 'layers\.0\.\w+_proj\.weight': weights are so"):
        list(wanted.quantize(model, plan, None))
