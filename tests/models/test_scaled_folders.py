"""Folders of AWQ and SmoothQuant: moved scales change no logit, the folder holds what was chosen,
and both backends run it alike.
"""

import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest

from pellucid.errors import FormatError
from pellucid.models.params import split_name
from pellucid.quant.awq import awq_layers
from pellucid.quant.calibrate import Floats, Walk, loader
from pellucid.quant.folder_model import FolderModel
from pellucid.quant.folder_types import find_folder_type
from pellucid.quant.gptq import GroupedCodes
from pellucid.quant.smoothquant import smooth_layers
from pellucid.quant.writers import plan_folder, write_folder
from pellucid.weights.checkpoint import open_checkpoint

from .harness import GOLDEN, GOLDEN_NAMES, NATIVE_BUDGET, Session, load
from .test_migration import golden, logits
from .test_quantized_folders import read_all, round_in_order
from .test_written_folders import parameters, windows, write

TYPES = ("awq-int4-g32", "w8a8")
FOLDERS = [name for name in GOLDEN_NAMES if name != "gpt2"]  # Conv1D cannot be written


def moved_model(name: str, kind: str) -> dict[str, Floats]:
    """All weights of a model after scales were moved, not rounded."""
    with open_checkpoint(GOLDEN / name) as checkpoint:
        walk = Walk(checkpoint.config, loader(checkpoint), windows(GOLDEN / name))
        found = loader(checkpoint)([n for n in walk.params if split_name(n)[0] is None])
        linear = {n: p for n, p in walk.params.items() if p.group and split_name(n)[0] is not None}
        if kind == "w8a8":
            layers = [layer.floats for layer in smooth_layers(walk, list(linear))]
        else:
            sizes = {n: 16 for n in linear}
            layers = [layer.floats for layer in awq_layers(walk, sizes)]
        for floats in layers:
            found |= floats
    return found


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_the_model_before_rounding_is_the_same(name: str, kind: str) -> None:
    config, weights, input_ids = golden(name)
    moved = moved_model(name, kind)
    assert moved.keys() == weights.keys()
    changed = [n for n in weights if not np.array_equal(moved[n], weights[n].astype(np.float32))]
    assert len(changed) >= 4 * config.num_layers
    # moved weights are rounded to float32, and nothing else is
    found = logits(config, {n: w.astype(np.float64) for n, w in moved.items()}, input_ids)
    expected = logits(config, weights, input_ids)
    assert np.abs(found - expected).max() <= 3e-6 * np.abs(expected).max()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_holds_what_was_chosen(name: str, kind: str, tmp_path: Path) -> None:
    chosen, _ = write(GOLDEN / name, tmp_path / "out", kind)
    before, after = parameters(GOLDEN / name), parameters(tmp_path / "out")
    integers = 0
    for parameter, values in after.items():
        if parameter not in chosen:
            np.testing.assert_array_equal(values, before[parameter])
            continue
        value = chosen[parameter].value
        if isinstance(value, GroupedCodes):
            integers += 1
            np.testing.assert_array_equal(values, value.values())
        elif name.startswith("gemma") and "norm" in parameter:  # stored as w, for 1 + w
            np.testing.assert_allclose(values, value, rtol=0, atol=2e-7 * np.abs(value).max())
        else:
            np.testing.assert_array_equal(values, value)
    assert integers >= 4


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", FOLDERS)
def test_both_backends_run_it_alike(name: str, kind: str, tmp_path: Path) -> None:
    write(GOLDEN / name, tmp_path / "out", kind)
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"].astype(np.int32)
    reference, tensors = load(tmp_path / "out", "reference"), read_all(tmp_path / "out")
    rounded = Session(reference, change_ops=round_in_order(reference, tensors)).prefill(input_ids)
    actual = Session(load(tmp_path / "out", "native")).prefill(input_ids)
    errors = np.abs(actual - rounded).max(axis=1) / np.abs(rounded).max()
    assert errors[:4].max() <= 2 * NATIVE_BUDGET and errors.max() <= 0.05, errors


def test_norms_that_scales_were_moved_into_are_stored_in_float32(tmp_path: Path) -> None:
    """Those of bfloat16 folders too. Others keep their type."""
    with open_checkpoint(GOLDEN / "gemma2") as checkpoint:
        model = FolderModel(checkpoint)
        kind = find_folder_type("awq-int4-g32")
        assert kind is not None
        plan = plan_folder(model, kind.layout)
    moved = {name for name in plan.moved if "norm" in name}
    assert moved == {
        f"layers.{i}.{norm}.weight"
        for i in range(model.config.num_layers)
        for norm in ("input_norm", "pre_mlp_norm")
    }
    for name, tensor in model.tensors.items():
        if not moved.isdisjoint(tensor.parameters):
            assert plan.after[name][name].format == "F32"


def test_damaged_activations_are_refused(tmp_path: Path) -> None:
    config, weights, input_ids = golden("llama")
    broken = {n: w.astype(np.float32) for n, w in weights.items()}
    broken["layers.1.input_norm.weight"] = broken["layers.1.input_norm.weight"] * np.float32(np.nan)

    def load_broken(names: object) -> dict[str, Floats]:
        return {n: broken[n] for n in names}  # type: ignore[attr-defined]

    sizes = {n: 16 for n in weights if n.endswith("proj.weight")}
    for layers in (
        awq_layers(Walk(config, load_broken, input_ids[None]), sizes),
        smooth_layers(Walk(config, load_broken, input_ids[None]), list(sizes)),
    ):
        next(layers)
        with pytest.raises(FormatError, match=r"layer.*1.* is NaN"):
            next(layers)


@pytest.mark.parametrize("kind", TYPES)
def test_config_json_says_how_to_read_it(kind: str, tmp_path: Path) -> None:
    write(GOLDEN / "llama", tmp_path / "out", kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    if kind == "w8a8":
        assert config["format"] == "int-quantized"
        inputs = config["config_groups"]["group_0"]["input_activations"]
        assert inputs["strategy"] == "token" and inputs["dynamic"] is True
    else:
        assert (config["quant_method"], config["version"], config["group_size"]) == (
            "awq",
            "gemm",
            32,
        )


@pytest.mark.parametrize("kind", TYPES)
def test_a_scale_that_float16_cannot_hold_is_refused(kind: str, tmp_path: Path) -> None:
    """That of weights above a million, or with 8 bits above 8 million. Nothing is left."""
    found = find_folder_type(kind)
    assert found is not None
    with open_checkpoint(GOLDEN / "llama") as checkpoint:
        model = FolderModel(checkpoint)
        usual = model.load

        def load_huge(names: Collection[str]) -> dict[str, Floats]:
            return {n: w * np.float32(1e9) for n, w in usual(names).items()}

        model.load = load_huge
        plan = plan_folder(model, found.layout)
        replacements = found.quantize(model, plan, None)
        with pytest.raises(FormatError, match="float16 holds 65504 at most"):
            list(write_folder(model, tmp_path / "out", plan, replacements))
    assert list(tmp_path.iterdir()) == []
