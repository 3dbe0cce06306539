"""Quantizing real models: the bytes of llama-quantize."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pellucid.formats import quantize
from tests.unit.quantize_tensors import REAL_MODELS, REAL_TENSORS, digest, importance_of, real_rows

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "quantize" / "golden.json").read_text()
)["tensors"]


@pytest.mark.parametrize("model", REAL_MODELS)
@pytest.mark.parametrize("name", REAL_TENSORS)
def test_tensors_have_the_bytes_of_llama_quantize(
    model: str, name: str, real_model: Callable[[str], Path]
) -> None:
    x = real_rows(real_model(model), name)
    importance = importance_of(x.shape[1], 7)
    made = {
        format: [digest(quantize(x, format, given).data) for given in (None, importance)]
        for format in GOLDEN[f"{model}/{name}"]
    }
    assert made == GOLDEN[f"{model}/{name}"]
