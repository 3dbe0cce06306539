"""The walk of calibration: the same inputs of linear layers as in one forward pass, for each model
family.
"""

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.backends.reference import ops as reference
from pellucid.quant.calibrate import Walk, loader
from pellucid.quant.imatrix import collect_imatrix
from pellucid.weights.checkpoint import open_checkpoint

from .convert import convert
from .harness import GOLDEN, GOLDEN_NAMES, Session, load
from .test_declarations import with_ops

Array = NDArray[np.float32]


def whole_inputs(path: Path, input_ids: NDArray[np.int32]) -> dict[str, Array]:
    """The input of each parameter's product, in one forward pass."""
    loaded = load(path, "reference")
    names = {id(weight): name for name, weight in loaded.weights.items()}
    inputs: dict[str, Array] = {}

    def listen(ops: Any) -> Any:
        def linear(x: Array, weight: Array, bias: Array | None = None) -> Any:
            inputs[names[id(weight)]] = x.copy()
            return ops.linear(x, weight, bias)

        return with_ops(ops, linear=linear)

    Session(loaded, change_ops=listen).prefill(input_ids)
    return inputs


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_each_group_sees_the_inputs_of_one_forward_pass(name: str) -> None:
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"].astype(np.int32)
    expected = whole_inputs(GOLDEN / name, input_ids)
    seen: dict[str, list[Array]] = {}

    def observe(group: str, x: Array) -> None:
        seen.setdefault(group, []).append(x.copy())

    # two windows of the same tokens
    with open_checkpoint(GOLDEN / name) as checkpoint:
        two = np.stack([input_ids, input_ids])
        walk = Walk(checkpoint.config, loader(checkpoint), two)
        for layer in range(walk.config.num_layers):
            walk.run_layer(layer, walk.load_layer(layer), observe)
        walk.run_head(observe)
        params = walk.params
    assert {params[weight].group for weight in expected} == seen.keys()
    for weight, x in expected.items():
        (both,) = seen[params[weight].group or ""]
        scale = float(np.abs(x).max())
        for half in np.split(both, 2):
            np.testing.assert_allclose(half, x, atol=2e-5 * scale, rtol=0)


def test_nothing_that_was_observed_outlives_the_run_of_a_layer() -> None:
    """Hessians of a gigabyte in all must not wait until Python looks for cycles."""
    name = GOLDEN_NAMES[0]
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"].astype(np.int32)
    with open_checkpoint(GOLDEN / name) as checkpoint:
        walk = Walk(checkpoint.config, loader(checkpoint), input_ids[None])
        weights = walk.load_layer(0)

        def observe_once() -> weakref.ref[Any]:
            seen: list[Array] = []

            def observe(group: str, x: Array) -> None:
                seen.append(x.T @ x)

            walk.run_layer(0, weights, observe, advance=False)
            return weakref.ref(seen[0])

        gc.disable()
        try:
            assert observe_once()() is None
        finally:
            gc.enable()


def test_a_layer_can_be_observed_again_with_other_weights() -> None:
    input_ids = np.load(GOLDEN / "llama" / "expected.npz")["input_ids"].astype(np.int32)
    with open_checkpoint(GOLDEN / "llama") as checkpoint:
        walk = Walk(checkpoint.config, loader(checkpoint), input_ids[None])
        weights = walk.load_layer(0)
        found: list[tuple[str, Array]] = []
        for change in (1.0, 2.0):
            changed = weights | {
                "layers.0.v_proj.weight": weights["layers.0.v_proj.weight"] * change
            }
            walk.run_layer(
                0,
                changed,
                lambda group, x: found.append((group, x.copy())),
                advance=False,
                last_group="layers.0.attn_output",
            )
    groups = [group for group, _ in found]
    assert groups == ["layers.0.attn_input", "layers.0.attn_output"] * 2  # and nothing after these
    np.testing.assert_array_equal(found[0][1], found[2][1])
    np.testing.assert_allclose(2 * found[1][1], found[3][1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "changed", [None, "q_proj.weight", "o_proj.weight", "input_norm.weight", "pre_mlp_norm.weight"]
)
def test_what_is_kept_between_runs_changes_no_input(changed: str | None) -> None:
    """After runs that end at each group, and the change of a weight, a run sees and gives what it
    sees and gives in a walk that ran nothing before.
    """
    input_ids = np.load(GOLDEN / "llama" / "expected.npz")["input_ids"].astype(np.int32)
    results = []
    with open_checkpoint(GOLDEN / "llama") as checkpoint:
        for runs_before in (False, True):
            walk = Walk(checkpoint.config, loader(checkpoint), input_ids[None])
            weights = walk.load_layer(0)
            if runs_before:
                for group in walk.groups_of(0, weights):
                    assert len(list(walk.inputs(0, weights, group))) == 1
            if changed is not None:
                name = f"layers.0.{changed}"
                weights = weights | {name: weights[name] * np.float32(1.5)}
            found = [next(walk.inputs(0, weights, g)) for g in walk.groups_of(0, weights)]
            walk.run_layer(0, weights)
            behind = next(walk.inputs(1, walk.load_layer(1), "layers.1.attn_input"))
            results.append([*found, behind])
    for fresh, kept in zip(*results, strict=True):
        np.testing.assert_array_equal(fresh, kept)


def test_a_product_of_an_earlier_run_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    input_ids = np.load(GOLDEN / "llama" / "expected.npz")["input_ids"].astype(np.int32)
    with open_checkpoint(GOLDEN / "llama") as checkpoint:
        walk = Walk(checkpoint.config, loader(checkpoint), input_ids[None])
        weights = walk.load_layer(0)
        computed: list[int] = []
        product = reference.linear

        def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
            computed.append(id(weight))
            return product(x, weight, bias)

        monkeypatch.setattr(reference, "linear", linear)
        groups = walk.groups_of(0, weights)
        computed.clear()
        for group in groups:
            list(walk.inputs(0, weights, group))
        walk.run_layer(0, weights)
    assert len(computed) == len(set(computed)) == 7


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_an_importance_matrix_has_the_names_of_a_gguf_file(name: str, tmp_path: Path) -> None:
    """Those of a folder are the same as those of its GGUF file, fused tensors included."""
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"].astype(np.int32)[None]
    convert(GOLDEN / name, tmp_path / "model.gguf")
    found = []
    for path in (GOLDEN / name, tmp_path / "model.gguf"):
        with open_checkpoint(path) as checkpoint:
            found.append(collect_imatrix(checkpoint, input_ids, "text", with_output=True))
    folder, file = (matrix.importance() for matrix in found)
    assert folder.keys() == file.keys()
    with open_checkpoint(tmp_path / "model.gguf") as checkpoint:
        specs = checkpoint.gguf.tensors  # type: ignore[attr-defined]
    for weight, means in file.items():
        assert means.shape == specs[weight].shape[-1:]
