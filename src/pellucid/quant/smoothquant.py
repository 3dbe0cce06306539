"""SmoothQuant (Xiao et al., arXiv:2211.10438): weights and activations in int8.

A token's activations share one scale, max|x| / 127. Some channels are always much larger than the
others, and where one of them sets the scale, the others are rounded to a few steps. Weights have no
such channels. So a part of the difference is moved into them (equation 4 of the paper):

    y = (x / s) · (W · diag(s))ᵀ        s = max|x|^α / max|w|^(1 - α), for each channel

α = 0.5 is the paper's default; it is best near 0.8 for later models, and differs from activation to
activation. So each takes the α of a short list, or no scales at all, with the least error of its
outputs on tokens of the calibration text. The error of a token is relative to its output, because
the first tokens of a text may be a thousand times larger than all others.

The paper moves scales into norms alone. `Migration` knows the values of attention and the MLP's
hidden states too. Dividing rows of an earlier matrix costs nothing, for each row has a scale of its
own. Weights are rounded with a scale per row.

Shapes: T tokens, R rows (outputs), n columns (channels), m scales (`Migration`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..formats.finite import check_activation, naming
from .calibrate import Floats, Walk
from .gptq import GroupedCodes, float16_scales
from .migration import Migration, find_migrations

__all__ = [
    "ALPHAS",
    "Activation",
    "SmoothLayer",
    "choose_scales",
    "quantize_rows",
    "quantize_tokens",
    "smooth_layers",
    "smoothing_scales",
]

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.4, 0.3)  # the paper's first: it is kept unless one is better
SAMPLE_TOKENS = 512  # of the calibration text, on which errors are measured
_FARTHEST = math.log(1e5)  # the largest logarithm of a scale


@dataclass(frozen=True, slots=True)
class SmoothLayer:
    """A layer, by canonical names: the int8 codes of its matrices, and all weights in floating
    point after scales were moved and before anything was rounded. `alphas` of each activation;
    None: it is not scaled.
    """

    codes: dict[str, GroupedCodes]
    floats: dict[str, Floats]
    alphas: dict[str, float | None]


@dataclass(slots=True)
class Activation:
    """An activation over the calibration text."""

    largest: Floats  # [n]: max|x|
    sample: list[Floats]  # tokens [·, n]


def smooth_layers(
    walk: Walk, names: Sequence[str], alphas: Sequence[float] = ALPHAS
) -> Iterator[SmoothLayer]:
    """Quantize the weights `names`, layer by layer, with one of `alphas` for each activation. An
    empty list leaves out SmoothQuant. Raises FormatError if an activation is NaN or infinite.
    """
    for layer in range(walk.config.num_layers):
        weights: Mapping[str, Floats] = walk.load_layer(layer)
        inputs = _observe(walk, layer, weights)
        chosen: dict[str, float | None] = {}
        for migration in find_migrations(walk.params, weights):
            own = [name for name in migration.consumers if name in names]
            if not own:
                continue
            matrix = np.concatenate([weights[name] for name in own])
            with naming(f"tensor {own[0]!r}"):
                alpha, scales = choose_scales(matrix, inputs[migration.group], migration, alphas)
            chosen[migration.group] = alpha
            weights = migration.move(weights, scales)
        codes = {}
        for name in names:
            if name in weights:
                with naming(f"tensor {name!r}"):
                    codes[name] = quantize_rows(weights[name])
        yield SmoothLayer(codes, dict(weights), chosen)


def _observe(walk: Walk, layer: int, weights: Mapping[str, Floats]) -> dict[str, Activation]:
    """Run the walk through a layer: the activations that its groups multiply."""
    found: dict[str, Activation] = {}
    stride = max(1, walk.num_tokens // SAMPLE_TOKENS)

    def observe(group: str, x: Floats) -> None:
        own = found.setdefault(group, Activation(np.zeros(x.shape[1], np.float32), []))
        np.maximum(own.largest, np.abs(x).max(axis=0), out=own.largest)
        step = min(stride, len(x))
        own.sample.append(x[step // 2 :: step].copy())

    walk.run_layer(layer, weights, observe)
    for group, own in found.items():
        check_activation(f"the input of {group}", bool(np.isfinite(own.largest).all()))
    return found


def choose_scales(
    weight: Floats, inputs: Activation, migration: Migration, alphas: Sequence[float]
) -> tuple[float | None, Floats]:
    """The α, and its scales [m], with the least error of weights [R, n] on the sampled tokens."""
    x = np.concatenate(inputs.sample)  # [T, n]
    exact = x @ weight.T  # [T, R]
    size = np.einsum("tr,tr->t", exact, exact)
    best: float | None = None
    best_scales = np.ones(migration.num_rows, np.float32)
    least = np.inf
    for alpha in (None, *alphas):
        scales = np.ones_like(best_scales)
        if alpha is not None:
            scales = smoothing_scales(inputs.largest, weight, migration, alpha)
        channels = scales[migration.rows]
        rounded = quantize_tokens(x / channels) @ quantize_rows(weight * channels).values().T
        rounded -= exact
        errors = np.einsum("tr,tr->t", rounded, rounded)
        loss = float(np.mean(np.divide(errors, size, out=np.zeros_like(size), where=size > 0)))
        if loss < least:
            best, best_scales, least = alpha, scales, loss
    return best, best_scales


def smoothing_scales(largest: Floats, weight: Floats, migration: Migration, alpha: float) -> Floats:
    """s of equation 4 [m], from max|x| [n] and weights [R, n], divided by its geometric mean: a
    factor of all channels changes no code, but the scales of weights must stay in float16's range.
    Channels that were always 0, and those without weights, get 1.
    """
    x = migration.largest(largest).astype(np.float64)
    w = migration.largest(np.abs(weight).max(axis=0)).astype(np.float64)
    live = (x > 0) & (w > 0)
    logs = np.zeros(len(x))
    logs[live] = alpha * np.log(x[live]) - (1 - alpha) * np.log(w[live])
    logs[live] -= logs[live].mean() if live.any() else 0
    scales: Floats = np.exp(np.clip(logs, -_FARTHEST, _FARTHEST)).astype(np.float32)
    return scales


def quantize_rows(weight: Floats) -> GroupedCodes:
    """A weight [R, n] as int8 with a scale per row, in -127 … 127; codes are stored plus 128."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    scales = float16_scales(scales)
    codes = np.clip(np.rint(weight / scales), -127, 127) + 128
    group_of = np.zeros(weight.shape[1], np.int32)
    zeros = np.full(scales.shape, 128, np.uint8)
    return GroupedCodes(codes.astype(np.uint8), scales, zeros, group_of, 8)


def quantize_tokens(x: Floats) -> Floats:
    """Activations [T, n] as they are after rounding to int8 with a scale per token."""
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    codes = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    rounded: Floats = np.rint(codes) * scale
    return rounded
