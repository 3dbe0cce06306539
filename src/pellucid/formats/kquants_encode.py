"""Writing k-quants: the scale of each group is searched, the scales are quantized, and every value
is rounded once more with the scale that is stored.

Without weights of values, ggml weighs a value by its own size and rounds the scales plainly. With
weights, it also searches the super-block's scale of scales. The bytes are ggml's (quantize_row_q*_K
_ref and _impl in ggml/src/ggml-quants.c). Layouts are explained beside the decoders in
`kquants.py`.

Values and weights are float32 [n, 256], blocks uint8 [n, B]; G groups of S values, G · S = 256.
"""

import numpy as np
from numpy.typing import NDArray

from .base import Blocks, Values, as_bytes, check_values, pack_planes, stored_scale
from .kquants_layout import Q2_K_LAYOUT, Q3_K_LAYOUT, Q4_K_LAYOUT, Q5_K_LAYOUT, Q6_K_LAYOUT
from .search import (
    ALL_ZERO,
    WEIGHTED_TRIALS,
    Codes,
    Floats,
    first_extreme,
    nearest,
    search_min,
    search_positive,
    search_symmetric,
    search_symmetric_descent,
    sum_in_order,
)

__all__ = ["quantize_q2_k", "quantize_q3_k", "quantize_q4_k", "quantize_q5_k", "quantize_q6_k"]

Bytes = NDArray[np.uint8]


def quantize_q2_k(values: Values, weights: Values | None) -> Blocks:
    """16 groups of 16. Without weights, the error is the sum of magnitudes, weighted by |x|."""
    check_values(values, "Q2_K")
    trials = (-0.5, 0.1, 15) if weights is None else WEIGHTED_TRIALS
    w = np.abs(values) if weights is None else weights
    x, w = values.reshape(-1, 16), w.reshape(-1, 16)
    scale, minimum, q = search_min(x, w, 3, trials, absolute=weights is None)
    blocks = np.empty(len(values), Q2_K_LAYOUT)
    scales, minima, blocks["d"], blocks["dmin"] = _two_scales(
        scale, minimum, None if weights is None else w, 16, 15, "Q2_K"
    )
    blocks["scales"] = scales | minima << np.uint8(4)
    blocks["qs"] = pack_planes(
        _round_again(values, q, blocks["d"], scales, 0, 3, blocks["dmin"], minima), 2, 32
    )
    return as_bytes(blocks)


def quantize_q3_k(values: Values, weights: Values | None) -> Blocks:
    """16 groups of 16, symmetric. Without weights, codes are found by coordinate descent."""
    check_values(values, "Q3_K")
    x = values.reshape(-1, 16)
    blocks = np.empty(len(values), Q3_K_LAYOUT)
    # d, and the scales of the groups as 0 … 63
    if weights is None:
        scale, q = search_symmetric_descent(x, 4)
        grouped = scale.reshape(-1, 16)
        inverse = np.float32(-32) / first_extreme(grouped)
        scales = np.clip(nearest(inverse[:, None] * grouped), -32, 31) + 32
        none = first_extreme(grouped) == 0
        scales[none] = 0
        d = np.where(none, np.float32(0), np.float32(1) / inverse)
    else:
        w = weights.reshape(-1, 16)
        scale, q = search_symmetric(x, w, 4)
        d, scales = search_symmetric(scale.reshape(-1, 16), sum_in_order(w).reshape(-1, 16), 32)
    blocks["d"] = stored_scale(d, "Q3_K")
    packed = scales.astype(np.uint8)
    blocks["scales"][:, :8] = pack_planes(packed & np.uint8(15), 4, 8)
    blocks["scales"][:, 8:] = pack_planes(packed >> np.uint8(4), 2, 4)
    # the codes
    codes = _round_again(values, q, blocks["d"], scales - 32, -4, 3)
    blocks["hmask"] = pack_planes(codes >> np.uint8(2), 1, 32)
    blocks["qs"] = pack_planes(codes & np.uint8(3), 2, 32)
    return as_bytes(blocks)


def quantize_q4_k(values: Values, weights: Values | None) -> Blocks:
    """8 groups of 32."""
    blocks = np.empty(len(values), Q4_K_LAYOUT)
    codes = _quantize_q45(values, weights, blocks, 15, (-1.0, 0.1, 20), "Q4_K")
    blocks["qs"] = pack_planes(codes, 4, 32)
    return as_bytes(blocks)


def quantize_q5_k(values: Values, weights: Values | None) -> Blocks:
    """Q4_K with codes of five bits."""
    blocks = np.empty(len(values), Q5_K_LAYOUT)
    codes = _quantize_q45(values, weights, blocks, 31, (-0.5, 0.1, 15), "Q5_K")
    blocks["qh"] = pack_planes(codes >> np.uint8(4), 1, 32)
    blocks["qs"] = pack_planes(codes & np.uint8(15), 4, 32)
    return as_bytes(blocks)


def quantize_q6_k(values: Values, weights: Values | None) -> Blocks:
    """16 groups of 16, symmetric, with int8 scales. Without weights, a value is weighted by x²."""
    check_values(values, "Q6_K")
    x = values.reshape(-1, 16)
    scale, q = search_symmetric(x, x * x if weights is None else weights.reshape(-1, 16), 32)
    # d, and the scales of the groups as -128 … 127
    grouped = scale.reshape(-1, 16)
    extreme = first_extreme(grouped)
    zero = np.abs(extreme) < ALL_ZERO
    inverse = np.float32(-128) / extreme
    scales = np.minimum(127, nearest(inverse[:, None] * grouped)).astype(np.int8)
    blocks = np.empty(len(values), Q6_K_LAYOUT)
    blocks["d"] = stored_scale(np.where(zero, np.float32(0), np.float32(1) / inverse), "Q6_K")
    blocks["scales"] = scales
    # the codes
    codes = _round_again(values, q, blocks["d"], scales.astype(np.int32), -32, 31)
    blocks["ql"] = pack_planes(codes & np.uint8(15), 4, 64)
    blocks["qh"] = pack_planes(codes >> np.uint8(4), 2, 32)
    packed = as_bytes(blocks)
    packed[zero] = 0
    return packed


def _quantize_q45(
    values: Values,
    weights: Values | None,
    blocks: NDArray[np.void],
    largest: int,
    plain_trials: tuple[float, float, int],
    name: str,
) -> Bytes:
    """The codes [n, 256] of Q4_K or Q5_K; writes d, dmin and scales into `blocks`."""
    check_values(values, name)
    x = values.reshape(-1, 32)
    if weights is None:
        root = np.sqrt(sum_in_order(x * x) / np.float32(32))
        w, trials = root[:, None] + np.abs(x), plain_trials
    else:
        w, trials = weights.reshape(-1, 32), WEIGHTED_TRIALS
    scale, minimum, q = search_min(x, w, largest, trials)
    scales, minima, blocks["d"], blocks["dmin"] = _two_scales(
        scale, minimum, None if weights is None else w, 8, 63, name
    )
    # six bits of each scale and minimum, see `_scales_and_minima` in kquants.py
    high_s, high_m = scales[:, 4:] >> np.uint8(4), minima[:, 4:] >> np.uint8(4)
    low = scales[:, 4:] & np.uint8(15) | minima[:, 4:] << np.uint8(4)
    blocks["scales"][:, 0:4] = scales[:, :4] | high_s << np.uint8(6)
    blocks["scales"][:, 4:8] = minima[:, :4] | high_m << np.uint8(6)
    blocks["scales"][:, 8:12] = low
    return _round_again(values, q, blocks["d"], scales, 0, largest, blocks["dmin"], minima)


def _two_scales(
    scale: Floats, minimum: Floats, weights: Floats | None, groups: int, largest: int, name: str
) -> tuple[Bytes, Bytes, NDArray[np.float16], NDArray[np.float16]]:
    """Scales and minima >= 0 of all groups, quantized to 0 … largest per super-block: (scales
    [n, G], minima [n, G], d [n], dmin [n]). `weights` are those of the values, [n · G, S].
    """
    quantized = []
    for grouped in (scale.reshape(-1, groups), minimum.reshape(-1, groups)):
        if weights is None:
            top = np.maximum(grouped.max(axis=1), np.float32(0))
            inverse = np.where(top > 0, np.float32(largest) / top, np.float32(0))
            codes = np.minimum(nearest(inverse[:, None] * grouped), largest)
            d = top / np.float32(largest)
        else:
            d, codes = search_positive(grouped, sum_in_order(weights).reshape(-1, groups), largest)
        quantized.append((codes.astype(np.uint8), stored_scale(d, name)))
    (scales, d_scale), (minima, d_min) = quantized
    return scales, minima, d_scale, d_min


def _round_again(
    values: Values,
    searched: Codes,
    d: NDArray[np.float16],
    scales: Bytes | Codes,
    smallest: int,
    largest: int,
    dmin: NDArray[np.float16] | None = None,
    minima: Bytes | None = None,
) -> Bytes:
    """The codes [n, 256], minus `smallest`, with the scales as they are stored: d · scales [n, G]
    and dmin · minima [n, G]. A group whose scale became 0 keeps the codes of its search.
    """
    n, groups = scales.shape
    x = values.reshape(n, groups, -1)
    if dmin is not None and minima is not None:
        x = x + (dmin.astype(np.float32)[:, None] * minima)[:, :, None]
    scale = d.astype(np.float32)[:, None] * scales.astype(np.float32)  # [n, G]
    codes = np.clip(nearest(x / scale[:, :, None]), smallest, largest) - smallest
    kept = searched.reshape(n, groups, -1)
    return np.where((scale == 0)[:, :, None], kept, codes).astype(np.uint8).reshape(n, 256)
