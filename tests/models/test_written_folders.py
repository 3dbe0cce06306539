"""Folders that are written, read back by the same code that reads those of other programs."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pellucid.errors import UnsupportedError
from pellucid.formats import dequantize
from pellucid.quant.folder_model import FolderModel
from pellucid.quant.folder_types import find_folder_type
from pellucid.quant.gptq import GroupedCodes
from pellucid.quant.writers import FolderReport, Replacement, plan_folder, write_folder
from pellucid.weights.checkpoint import open_checkpoint

from .harness import GOLDEN

NAMES = ("llama", "qwen2", "gemma3", "phi3", "gpt2")  # plain, biases, 1 + w, fused, transposed
TYPES = ("gptq-int4-g32", "gptq-int8-g-1-actorder", "gptq-int3-g-1-asym", "w4a16", "w8a16", "int8")


def windows(source: Path) -> np.ndarray:
    input_ids = np.load(source / "expected.npz")["input_ids"].astype(np.int32)
    return np.stack([np.roll(input_ids, i) for i in range(8)])


def write(
    source: Path, out: Path, name: str, *, calibrated: bool = True
) -> tuple[dict[str, Replacement], list[FolderReport]]:
    """Write a folder: what the method chose, by canonical name, and the reports."""
    kind = find_folder_type(name)
    assert kind is not None
    chosen: dict[str, Replacement] = {}
    with open_checkpoint(source) as checkpoint:
        model = FolderModel(checkpoint)
        plan = plan_folder(model, kind.layout)
        text = windows(source) if calibrated else None

        def listen() -> Iterator[Replacement]:
            for found in kind.quantize(model, plan, text):
                chosen[found.name] = found
                yield found

        reports = list(write_folder(model, out, plan, listen()))
    return chosen, reports


def parameters(path: Path) -> dict[str, np.ndarray]:
    with open_checkpoint(path) as checkpoint:
        return {name: dequantize(tensor) for name, tensor in checkpoint.parameters()}


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_is_read_as_what_was_chosen(
    name: str, kind: str, calibrated: bool, tmp_path: Path
) -> None:
    if name == "gpt2" and not kind.startswith("gptq"):
        with pytest.raises(UnsupportedError, match="Conv1D"):
            write(GOLDEN / name, tmp_path / "out", kind)
        return
    chosen, reports = write(GOLDEN / name, tmp_path / "out", kind, calibrated=calibrated)
    before, after = parameters(GOLDEN / name), parameters(tmp_path / "out")
    for parameter, values in after.items():
        if parameter not in chosen:
            np.testing.assert_array_equal(values, before[parameter])
            continue
        codes = chosen[parameter].value
        assert isinstance(codes, GroupedCodes)
        np.testing.assert_array_equal(values, codes.values())
    with open_checkpoint(GOLDEN / name) as checkpoint:
        assert len(chosen) >= 2 * checkpoint.config.num_layers
        assert sum(report.error is not None for report in reports) >= 2
