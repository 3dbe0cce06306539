"""Data sheets of devices, and the roof of quantized products."""

import pytest

from pellucid.backends.native.costs import SCALE_PRODUCTS
from pellucid.errors import PellucidError
from pellucid.measure.hardware import DATA_SHEETS, Ceilings, Range, data_sheet
from pellucid.ops.cost import OpCost


@pytest.mark.parametrize("name", DATA_SHEETS)
def test_a_data_sheet_says_that_it_is_one(name: str) -> None:
    device = data_sheet(name)
    assert not device.is_measured and device.source
    assert device.memory_bytes >= 10**10
    assert device.bandwidth_at(10**9) == device.bandwidth_range(10**12).median
    assert device.int8_peak > device.float_peak > 0


def test_a_device_is_found_however_its_name_is_written() -> None:
    assert data_sheet("RTX 4070") is data_sheet("rtx-4070") is DATA_SHEETS["rtx4070"]


def test_an_unknown_device_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(PellucidError, match=r"hardware 'h900' is unknown: it can be .*h100"):
        data_sheet("h900")


@pytest.mark.parametrize(("format", "share"), [("Q4_0", 8 / 10), ("Q4_K", 8 / 11)])
def test_scales_take_their_share_of_the_multipliers(format: str, share: float) -> None:
    """With dpbusd, 64 multiply-adds take as long as 16 of float32."""
    zen4 = Ceilings("", "measured", {1: Range.of([1e12])}, {"int8": 4e9, "float32": 1e9})
    products = 10**6 * 2 * 32
    cost = OpCost(
        products, 0, 0, int8_flops=products, scale_flops=products * SCALE_PRODUCTS[format] // 32
    )
    plain = zen4.arithmetic_seconds(cost, scales=False)
    assert plain / zen4.arithmetic_seconds(cost) == pytest.approx(share)
