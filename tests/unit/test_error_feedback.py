"""Error feedback into block formats: less is lost, in files of the same layout."""

from itertools import pairwise

import numpy as np
import pytest

from pellucid.formats import HostTensor, dequantize, quantize
from pellucid.formats.codes import GRIDS
from pellucid.quant.error_feedback import error_feedback, quadratic_loss

from .test_gptq import Doubles, correlated, heavy_tailed

N = 512
HESSIAN, FRESH = correlated(N, 0, tokens=4096)


def search(values: np.ndarray, format: str, importance: np.ndarray | None) -> HostTensor:
    return quantize(values, format, importance)


@pytest.mark.parametrize("format", GRIDS)
def test_less_is_lost_on_fresh_text_than_by_the_formats_own_search(format: str) -> None:
    weight = heavy_tailed(24, N, 1)
    importance = np.diag(HESSIAN).astype(np.float32)
    searched = search(weight, format, importance)
    found = error_feedback(weight, HESSIAN, format, search)
    assert found.spec == searched.spec and found.data.shape == searched.data.shape
    lost = [quadratic_loss(weight - dequantize(tensor), FRESH) for tensor in (found, searched)]
    assert lost[0] < 0.75 * lost[1]


@pytest.mark.parametrize("format", GRIDS)
def test_sweeps_and_refits_only_lower_the_loss(format: str) -> None:
    weight = heavy_tailed(8, N, 2)
    losses = []
    for sweeps, refits in ((0, 0), (1, 0), (2, 0), (2, 1), (2, 3)):
        found = error_feedback(weight, HESSIAN, format, search, sweeps=sweeps, refits=refits)
        losses.append(quadratic_loss(weight - dequantize(found), HESSIAN))
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))
    assert losses[-1] < losses[0]


def test_sweeps_end_where_no_single_code_helps() -> None:
    """On a grid that is easy to write down: Q8_0, by its neighbours."""
    hessian, _ = correlated(32, 3)
    weight = heavy_tailed(3, 32, 3)
    found = error_feedback(weight, hessian, "Q8_0", search, sweeps=20, refits=0)
    values = dequantize(found)
    step = found.data[:, :2].copy().view("<f2").astype(np.float32)
    for row, j, sign in np.ndindex(3, 32, 2):
        other = values.copy()
        other[row, j] += step[row, 0] * (2 * sign - 1)
        before, after = (quadratic_loss(weight - v, hessian) for v in (values, other))
        assert after >= before * (1 - 1e-5)


def test_what_does_not_help_on_other_text_is_not_used() -> None:
    weight = heavy_tailed(8, N, 4)
    searched = search(weight, "Q4_K", np.diag(HESSIAN).astype(np.float32))
    # other text in which inputs have nothing in common: feedback only adds to the error
    other: Doubles = np.eye(N)
    kept = error_feedback(weight, HESSIAN, "Q4_K", search, held_out=other)
    np.testing.assert_array_equal(kept.data, searched.data)
    used = error_feedback(weight, HESSIAN, "Q4_K", search, held_out=FRESH)
    assert not np.array_equal(used.data, searched.data)


def test_a_weight_of_zeros_stays_zero() -> None:
    for format in GRIDS:
        found = error_feedback(np.zeros((4, N), np.float32), HESSIAN, format, search)
        assert not dequantize(found).any(), format
