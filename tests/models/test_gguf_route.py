"""The golden models once more, by way of GGUF: the same weights under other names, layouts and
folds give the same logits.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid.config import ModelConfig
from pellucid.models.blocks import build_rope_tables
from pellucid.weights.checkpoint import open_checkpoint

from .convert import convert
from .harness import GOLDEN, GOLDEN_NAMES, Session, check_close, load

# What GGUF has no key for: scores scaled by something else than head_dim in Gemma, windows in Qwen
# 2.
LOST = {"gemma2": ("softmax_scale",), "gemma3": ("softmax_scale",), "qwen2": ("windows",)}


@pytest.fixture(scope="module", params=GOLDEN_NAMES)
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    convert(GOLDEN / request.param, path)
    return request.param, path


def test_config_from_gguf_equals_the_one_from_hugging_face(converted: tuple[str, Path]) -> None:
    name, path = converted
    with open_checkpoint(path) as ours, open_checkpoint(GOLDEN / name) as theirs:
        found, expected = ours.config, theirs.config
    changes: dict[str, Any] = {field: getattr(expected, field) for field in LOST.get(name, ())}
    assert found.norm_eps == pytest.approx(expected.norm_eps)
    changes |= {"norm_eps": expected.norm_eps, "rope": expected.rope}  # GGUF's numbers are float32
    if name == "mistral":
        changes["architecture"] = "mistral"  # GGUF calls it llama
    assert dataclasses.replace(found, **changes) == expected
    check_rope(found, expected)


def check_rope(found: ModelConfig, expected: ModelConfig) -> None:
    for ours, theirs in zip(build_rope_tables(found), build_rope_tables(expected), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            np.testing.assert_allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6)
            assert ours.scale == pytest.approx(theirs.scale, rel=1e-6)


def test_logits_from_gguf_equal_those_of_transformers(converted: tuple[str, Path]) -> None:
    name, path = converted
    loaded = load(path, "reference")
    with open_checkpoint(GOLDEN / name) as theirs:
        lost = {field: getattr(theirs.config, field) for field in LOST.get(name, ())}
    loaded = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **lost))
    expected = np.load(GOLDEN / name / "expected.npz")
    check_close(Session(loaded).prefill(expected["input_ids"]), expected["logits"])
