"""Encoders of quantized formats against llama-quantize, byte for byte; the compiled ones against
NumPy's; and what they refuse.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from pellucid import _native
from pellucid.errors import FormatError
from pellucid.formats import FORMATS, dequantize, get_format, quantize
from pellucid.quant.encode import Encoder

from .quantize_tensors import (
    SEARCHED_IN_32,
    SEARCHED_IN_256,
    SYNTHETIC,
    digest,
    formats_for,
    heavy_tailed,
    importance_of,
    zeros_of_both_signs,
)

FILE = json.loads((Path(__file__).parents[1] / "golden" / "quantize" / "golden.json").read_text())
GOLDEN, ZEROS = FILE["tensors"], FILE["tensors"]["zeros"]
SEARCHED = SEARCHED_IN_32 + SEARCHED_IN_256
CASES = [(name, f) for name, (_, columns) in SYNTHETIC.items() for f in formats_for(columns)]


@pytest.mark.parametrize(("name", "format"), CASES)
def test_bytes_are_those_of_llama_quantize(name: str, format: str) -> None:
    x = heavy_tailed(*SYNTHETIC[name], list(SYNTHETIC).index(name))
    plain, weighted = GOLDEN[name][format]
    assert digest(quantize(x, format).data) == plain
    assert digest(quantize(x, format, importance_of(x.shape[1], 7)).data) == weighted


@pytest.mark.parametrize("isa", _native.encoders())
@pytest.mark.parametrize("format", SEARCHED)
def test_compiled_encoders_give_the_same_bytes(isa: str, format: str) -> None:
    for rows, columns, threads in ((40, 768, 3), (1, 256, 1), (17, 2816, 2), (9, 512, 2)):
        x = (
            heavy_tailed(rows + 9, columns, rows)[-rows:]
            if rows < 9
            else heavy_tailed(rows, columns, rows)
        )
        importance = importance_of(columns, rows)
        encoder = Encoder(threads, isa)
        for given in (None, importance, np.zeros(columns, np.float32)):
            expected = quantize(x, format, given)
            np.testing.assert_array_equal(encoder.encode(x, format, given).data, expected.data)


@pytest.mark.parametrize("isa", _native.encoders())
@pytest.mark.parametrize("format", SEARCHED_IN_32)
def test_compiled_encoders_give_the_same_bytes_for_narrow_rows(isa: str, format: str) -> None:
    encoder = Encoder(2, isa)
    for rows, columns in ((33, 32), (20, 96), (16, 672)):
        x, importance = heavy_tailed(rows, columns, rows), importance_of(columns, rows)
        for given in (None, importance):
            np.testing.assert_array_equal(
                encoder.encode(x, format, given).data, quantize(x, format, given).data
            )


@pytest.mark.parametrize("format", SEARCHED)
@pytest.mark.parametrize("isa", ["numpy", *_native.encoders()])
def test_zeros_of_both_signs_are_kept_as_ggml_keeps_them(format: str, isa: str) -> None:
    """A scale that is 0 has the sign of the first zero
    that it meets.
    """
    encode = quantize if isa == "numpy" else Encoder(1, isa).encode
    for given, golden in zip((None, importance_of(256, 7)), ZEROS[format], strict=True):
        assert digest(encode(zeros_of_both_signs(), format, given).data) == golden


@pytest.mark.parametrize("format", SEARCHED)
def test_each_row_is_encoded_by_itself(format: str) -> None:
    x = heavy_tailed(24, 512, 3)
    importance = importance_of(512, 4)
    for given in (None, importance):
        whole = quantize(x, format, given).data
        for row in (0, 5, 23):
            np.testing.assert_array_equal(
                quantize(x[row : row + 1], format, given).data[0], whole[row]
            )


@pytest.mark.parametrize("format", sorted(set(SEARCHED) - {"Q8_0"}))
def test_columns_that_matter_lose_less(format: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    importance[::8] = 100

    def error(given: np.ndarray | None) -> float:
        lost = (dequantize(quantize(x, format, given)) - x) ** 2
        return float((lost * importance).sum())

    assert error(importance) < error(None)


def test_more_bits_lose_less() -> None:
    x = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    by_bits = sorted(SEARCHED_IN_256, key=lambda format: get_format(format).block_bytes)
    errors = [float(((dequantize(quantize(x, f)) - x) ** 2).mean()) for f in by_bits]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.12
    assert errors[-1] < 0.0006


@pytest.mark.parametrize("format", SEARCHED)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_that_are_not_finite_are_refused(format: str, bad: float, weighted: bool) -> None:
    x = np.zeros((2, 256), np.float32)
    x[1, 7] = bad
    importance = np.ones(256, np.float32) if weighted else None
    for encode in (quantize, Encoder(2).encode):
        with pytest.raises(FormatError, match=f"{format} cannot hold values"):
            encode(x, format, importance)


@pytest.mark.parametrize("format", SEARCHED)
def test_scales_beyond_float16_are_refused(format: str) -> None:
    x = np.full((1, 256), 1e9, np.float32) * np.linspace(-1, 1, 256, dtype=np.float32)
    for encode in (quantize, Encoder(2).encode):
        with pytest.raises(FormatError, match=f"{format} cannot hold a block whose scale"):
            encode(x, format, None)


def test_every_format_that_can_be_read_can_be_written() -> None:
    x = np.linspace(-1, 1, 512, dtype=np.float32).reshape(2, 256)
    for format in FORMATS:
        assert np.abs(dequantize(quantize(x, format)) - x).max() < 0.3


def test_importance_of_another_width_is_refused() -> None:
    with pytest.raises(FormatError, match=r"importance of \(128,\) columns"):
        quantize(np.zeros((2, 256), np.float32), "Q4_K", np.ones(128, np.float32))
