"""AWQ (Lin et al., arXiv:2306.00978): group-wise integers, after channels with large activations
were scaled up.

A weight that is rounded to a grid of steps Δ gets an error of about Δ/4, whatever its value. The
error in the output is that times the input x. If w is multiplied by s > 1 and x is divided by it, Δ
hardly changes, since it depends on the largest weight of a group, and the error falls by s
(equation 2 of the paper). So a channel's scale follows its activations (equation 5):

    s = mean|x|^a / mean(|w| / max|w of its group|)^(1 - a)        0 <= a <= 1

The divisor is AutoAWQ's: large weights are rounded well already. A channel with few large weights,
which set the steps of their groups, is helped more by s = (mean|x| / max|w|)^a. The search takes
the a of one of the two, or no scales at all, whose rounded weights have the least loss at the
output (equation 4):

    ‖Q(W · diag(s)) · diag(s)⁻¹ X - W X‖² / T = tr(E H Eᵀ)     E = Q(W · diag(s)) · diag(s)⁻¹ - W

H = X Xᵀ / T is GPTQ's Hessian. Then the largest weights of each group are clipped where that lowers
this loss, and the weights are rounded. AutoAWQ looks at each group alone. But clipped weights are
all too small, so their errors add up over the groups, which errors of rounding do not. Here a group
is clipped beside the errors of all others (log, "AWQ clips a group beside the others").

X are the inputs of the model in full precision, as in AutoAWQ. Its loss is that of the whole
attention or MLP, which needs a forward pass for each a; ours is that of the matrices.

Shapes: R rows (outputs), n columns (channels), m scales (`Migration`), G groups of g columns.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..formats.finite import check_activation, naming
from .calibrate import Floats, Walk
from .error_feedback import quadratic_loss
from .gptq import GroupedCodes, round_to_nearest
from .migration import Migration, find_migrations

__all__ = [
    "AWQLayer",
    "InputStatistics",
    "awq_layers",
    "clip_groups",
    "observe_layer",
    "search_scales",
]

Doubles: TypeAlias = NDArray[np.float64]

BITS = 4
EXPONENTS = 20  # a is 0, 1/20, … 1
SAMPLE_ROWS = 256  # on which exponents are compared
CLIPS = 10  # the bounds that are tried: 1, 19/20, … 11/20 of the largest weight
SWEEPS = 2  # over the groups, whose errors have changed meanwhile
_SMALLEST = np.float32(1e-4)  # of a scale, and of its divisor


@dataclass(slots=True)
class InputStatistics:
    """What AWQ needs of an activation, over the calibration text."""

    hessian: Doubles  # [n, n]: the mean of x·xᵀ
    mean: Floats  # [n]: the mean of |x|


@dataclass(frozen=True, slots=True)
class AWQLayer:
    """A layer, by canonical names: the integers of its matrices, and all weights in floating point
    after scales were moved and before anything was rounded.
    """

    codes: dict[str, GroupedCodes]
    floats: dict[str, Floats]


def awq_layers(walk: Walk, group_sizes: Mapping[str, int | None]) -> Iterator[AWQLayer]:
    """Quantize the weights in `group_sizes` to 4 bits, layer by layer. A size is the inputs per
    scale; None: a row has one.

    Raises ConfigError for a size that does not divide a width, and FormatError if an activation is
    NaN or infinite.
    """
    for layer in range(walk.config.num_layers):
        weights: Mapping[str, Floats] = walk.load_layer(layer)
        inputs = observe_layer(walk, layer, weights)
        # move scales, which changes weights that are rounded later
        for migration in find_migrations(walk.params, weights):
            names = [name for name in migration.consumers if name in group_sizes]
            if not names:
                continue
            found = inputs[migration.group]
            matrix = np.concatenate([weights[name] for name in names])
            with naming(f"tensor {names[0]!r}"):
                scales = search_scales(matrix, found, migration, group_sizes[names[0]])
            weights = migration.move(weights, scales)
            channels = scales[migration.rows].astype(np.float64)
            found.hessian /= np.outer(channels, channels)
        # clip and round
        codes = {}
        for name, size in group_sizes.items():
            if name in weights:
                hessian = inputs[walk.params[name].group or ""].hessian
                with naming(f"tensor {name!r}"):
                    codes[name] = _round(clip_groups(weights[name], hessian, size), size)
        yield AWQLayer(codes, dict(weights))


def observe_layer(
    walk: Walk, layer: int, weights: Mapping[str, Floats]
) -> dict[str, InputStatistics]:
    """Run the walk through a layer: the statistics of the input of each group. Raises FormatError
    if an activation is NaN or infinite.
    """
    found: dict[str, InputStatistics] = {}

    def observe(group: str, x: Floats) -> None:
        n = x.shape[1]
        own = found.setdefault(group, InputStatistics(np.zeros((n, n)), np.zeros(n, np.float32)))
        own.hessian += x.T @ x
        own.mean += np.abs(x).sum(axis=0)

    walk.run_layer(layer, weights, observe)
    for group, own in found.items():
        is_finite = bool(np.isfinite(np.diag(own.hessian)).all())
        check_activation(f"the input of {group}", is_finite)
        own.hessian /= walk.num_tokens
        own.mean /= walk.num_tokens
    return found


def search_scales(
    weight: Floats, inputs: InputStatistics, migration: Migration, group_size: int | None
) -> Floats:
    """The scales [m] with the least loss of weights [R, n], the matrices behind an activation one
    after another.
    """
    hessian = inputs.hessian.astype(np.float32)
    activations = migration.mean(inputs.mean)
    sizes = migration.mean(_relative_sizes(weight, group_size)) + _SMALLEST
    largest = np.maximum(migration.largest(np.abs(weight).max(axis=0)), _SMALLEST)
    exponents = [step / EXPONENTS for step in range(EXPONENTS + 1)]
    candidates = [activations**a / sizes ** (1 - a) for a in exponents]
    candidates += [(activations / largest) ** a for a in exponents[2::2]]
    # some rows are enough to compare them; begin with no scales
    weight = np.ascontiguousarray(weight[:: -(-len(weight) // SAMPLE_ROWS)])
    best = np.ones(len(activations), np.float32)
    least = quadratic_loss(_round(weight, group_size).values() - weight, hessian)
    for candidate in candidates:
        scales = _centred(candidate, activations > 0)
        channels = scales[migration.rows]
        rounded = _round(weight * channels, group_size).values() / channels
        loss = quadratic_loss(rounded - weight, hessian)
        if loss < least:
            best, least = scales, loss
    return best


def clip_groups(weight: Floats, hessian: Doubles, group_size: int | None) -> Floats:
    """The weight [R, n] with the groups of each row clipped, one after another, to the bounds that
    give the row's output the least loss.
    """
    n = weight.shape[1]
    size = group_size or n
    clipped = weight.copy()
    error: Floats = _round(weight, group_size).values() - weight
    products: Floats = hessian.astype(np.float32)
    for start in [*range(0, n, size)] * SWEEPS:
        group = slice(start, start + size)
        values, own = np.ascontiguousarray(weight[:, group]), products[group, group]
        # with the error e of this group, a row's loss is e H eᵀ + e · others, and what all share
        others: Floats = error @ products[:, group]
        others -= error[:, group] @ own
        others *= 2
        largest = np.abs(values).max(axis=1, keepdims=True)
        least = _row_losses(error[:, group], own, others)
        for step in range(CLIPS):
            bound = largest * np.float32(1 - step / (2 * CLIPS))
            candidate = np.clip(values, -bound, bound)
            found = _round(candidate, None).values() - values
            losses = _row_losses(found, own, others)
            better = losses < least
            clipped[better, group], error[better, group] = candidate[better], found[better]
            least = np.minimum(least, losses)
    return clipped


def _row_losses(error: Floats, hessian: Floats, others: Floats) -> Floats:
    """The loss of each row of a group. [R]"""
    losses: Floats = np.einsum("rn,rn->r", error @ hessian + others, error)
    return losses


def _relative_sizes(weight: Floats, group_size: int | None) -> Floats:
    """The mean size [n] of each column's weights, relative to the largest of their group."""
    rows, n = weight.shape
    sizes = np.abs(weight).reshape(rows, -1, group_size or n)
    sizes /= sizes.max(axis=2, keepdims=True) + np.float32(1e-6)
    mean: Floats = sizes.reshape(rows, n).mean(axis=0)
    return mean


def _centred(scales: Floats, live: NDArray[np.bool_]) -> Floats:
    """The scales with 1 as their middle, which is also the scale of channels that were always 0:
    other text may use them.
    """
    if not live.any():
        return np.ones(len(scales), np.float32)
    scales = np.maximum(scales, _SMALLEST)
    middle = np.sqrt(scales[live].max() * scales[live].min())
    return np.where(live, scales / middle, np.float32(1)).astype(np.float32)


def _round(weight: Floats, group_size: int | None) -> GroupedCodes:
    return round_to_nearest(weight, bits=BITS, group_size=group_size, symmetric=False)
