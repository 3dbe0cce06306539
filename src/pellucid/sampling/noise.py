"""Gumbel noise without a generator: a pure function of (seed, position, token id).

One idea: a random number is computed from what it is for, and not taken from a stream in the order
of the calls. So a token's noise does not depend on other requests, on how the batch is cut, or on
which tokens of the vocabulary are looked at. A position that is recomputed or speculated gets the
same noise again. (Counter-based generators: Salmon et al., "Parallel random numbers: as easy as 1,
2, 3", SC 2011.)

A Gumbel variable is -ln E, where E is a standard exponential. The exponentials are drawn in groups
of 64 tokens. Exponential waiting times are memoryless: the first of 64 events comes after E/64, it
is any of them with equal probability, and each of the others then waits a further E of its own. So
one number per group bounds the noise of the whole group, and a search for the largest score skips
groups that cannot have it. Each token's noise is still an independent Gumbel variable. A slab is 64
rows of 512 tokens, and a group is a column of it, so that vector instructions along the rows find
the largest logits of all groups of a slab.

The bits are SplitMix64's (Steele, Lea & Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): the t-th output of that generator is mix(state + (t + 1)·γ), computed directly for any
t. It is used at two levels: seed and position give a state, and token ids and groups are counters
on that state. Adjacent seeds and positions give unrelated states, because a change of one input bit
changes half of the bits of mix.

Integers are exact on every machine. The logarithms are the platform's and may differ in the last
bit between machines. That changes a draw only if two scores are within about 1e-15 of each other.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LARGEST_GUMBEL",
    "SMALLEST_GUMBEL",
    "group_maxima",
    "groups_of",
    "gumbel",
    "leaders",
    "members",
    "noise_state",
    "random_bits",
]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio, odd
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SLICE = 1 << 14  # token ids computed at a time: their bits fit in the cache

_ROW_BITS, _COLUMN_BITS = 6, 9
_ROWS, _COLUMNS = 1 << _ROW_BITS, 1 << _COLUMN_BITS  # members of a group, groups of a slab
_SLAB_BITS = _ROW_BITS + _COLUMN_BITS
_SLAB = 1 << _SLAB_BITS
_FIRST_GROUP = 1 << 32  # group numbers count from here, token ids from 0

# gumbel() of its smallest and largest uniform, 2⁻⁵³ and 1 - 2⁻⁵³, rounded outward
SMALLEST_GUMBEL = -3.62
LARGEST_GUMBEL = 40.90


def noise_state(seed: int, position: int) -> int:
    """The state that the noise of a request's position is computed from. `seed` is taken modulo
    2⁶⁴; the position is not negative.
    """
    return _mix_int(_mix_int(seed + _GAMMA) + (position + 1) * _GAMMA)


def random_bits(states: NDArray[np.uint64], numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each pair of a state and one of `numbers` [..., n], which broadcast and
    are not negative.
    """
    bits = np.asarray(numbers.astype(np.uint64) * np.uint64(_GAMMA) + (states + np.uint64(_GAMMA)))
    flat = bits.reshape(-1)
    for start in range(0, flat.size, _SLICE):
        _mix(flat[start : start + _SLICE])
    return bits


def gumbel(states: NDArray[np.uint64], token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A standard Gumbel variable for each of `token_ids` [n], from the states of their positions,
    [n] or [1] -> [n].

    The largest of logit + gumbel is a draw from softmax(logits) (Gumbel 1954; Maddison, Tarlow &
    Minka, arXiv:1411.0030).
    """
    first, leader = _first_of_groups(states, groups_of(token_ids))
    wait = _exponential(random_bits(states, token_ids))
    wait[(token_ids >> _COLUMN_BITS & (_ROWS - 1)) == leader] = 0.0
    wait += first
    return _negative_log(wait)


def leaders(
    states: NDArray[np.uint64], vocab_size: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """For states [R]: the largest noise of each group, and the token that has it, which may lie
    beyond the vocabulary. Both [R, G].
    """
    groups = np.arange(-(-vocab_size // _SLAB) * _COLUMNS)
    first, leader = _first_of_groups(states[:, None], groups)
    return _negative_log(first), _token_ids(groups, leader)


def groups_of(token_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """The group of each token."""
    groups: NDArray[np.int64] = (token_ids >> _SLAB_BITS << _COLUMN_BITS) + (
        token_ids & (_COLUMNS - 1)
    )
    return groups


def members(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The tokens of `groups` [n] -> [n, 64], some of which may lie beyond the vocabulary."""
    return _token_ids(groups[:, None], np.arange(_ROWS))


def group_maxima(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest of the logits [V] of each group [G]; -inf for a group beyond the vocabulary."""
    whole = logits.size // _SLAB * _SLAB
    largest: NDArray[np.float32] = logits[:whole].reshape(-1, _ROWS, _COLUMNS).max(axis=1).ravel()
    if whole == logits.size:
        return largest
    rest = np.full(_SLAB, -np.inf, np.float32)
    rest[: logits.size - whole] = logits[whole:]
    return np.concatenate([largest, rest.reshape(_ROWS, _COLUMNS).max(axis=0)])


def _token_ids(groups: NDArray[np.int64], member: NDArray[np.int64]) -> NDArray[np.int64]:
    token_ids: NDArray[np.int64] = (
        (groups >> _COLUMN_BITS << _SLAB_BITS)
        + (groups & (_COLUMNS - 1))
        + (member << _COLUMN_BITS)
    )
    return token_ids


def _first_of_groups(
    states: NDArray[np.uint64], groups: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The waiting time of the first member of each group (from the high 52 of its random bits), and
    which member it is (from the low 6).
    """
    bits = random_bits(states, groups + _FIRST_GROUP)
    leader = (bits & np.uint64(_ROWS - 1)).view(np.int64)
    first = _exponential(bits)
    first /= _ROWS
    return first, leader


def _exponential(bits: NDArray[np.uint64]) -> NDArray[np.float64]:
    """-ln u, in place of the bits; u is uniform over the midpoints of 2⁵² parts of (0, 1)."""
    bits >>= np.uint64(12)
    # the bits of a float64 in [1, 2), whose fraction is random
    bits |= np.uint64(0x3FF0000000000000)
    u = bits.view(np.float64)
    u -= 1.0 - 2.0**-53  # exact: never 0, never 1
    return _negative_log(u)


def _negative_log(x: NDArray[np.float64]) -> NDArray[np.float64]:
    np.log(x, out=x)
    return np.negative(x, out=x)


def _mix(x: NDArray[np.uint64]) -> None:
    """SplitMix64's finalizer (Stafford's variant 13), in place: a bijection in which every output
    bit depends on every input bit.
    """
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MULTIPLIERS[0])
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MULTIPLIERS[1])
    x ^= x >> np.uint64(31)


def _mix_int(x: int) -> int:
    """`_mix` of one integer, modulo 2⁶⁴."""
    x &= _MASK
    x = (x ^ (x >> 30)) * _MULTIPLIERS[0] & _MASK
    x = (x ^ (x >> 27)) * _MULTIPLIERS[1] & _MASK
    return x ^ (x >> 31)
