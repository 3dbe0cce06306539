"""Gumbel noise without a generator: a pure function of (seed, position, token id).

One idea: random numbers are computed from what they are for, instead of taken from a stream in the order of the asking. So a token's noise
is the same whatever else runs, however the batch is cut, and whichever tokens of the vocabulary are asked about; a recomputed or speculated
position meets the very noise it would have met. (Counter-based generators: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3",
SC 2011.)

The bits are SplitMix64's (Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): the t-th output of that
generator is mix(state + (t + 1)·γ), which needs no walk to t. Two levels of it: seed and position give a state, and the token id counts
from that state. Adjacent seeds and positions give unrelated states because mix turns over half of the bits for each bit that changes.

Integers are exact on every machine. The logarithms are the platform's, which differ in the last bit between machines: that moves a draw
only where two scores lie within about 1e-15 of each other.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["LARGEST_GUMBEL", "SMALLEST_GUMBEL", "gumbel", "random_bits"]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15  # 2⁶⁴ / golden ratio, odd
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SLICE = 1 << 14  # token ids worked on at a time: their bits stay in the cache

# gumbel() at the ends of its uniforms, 2⁻⁵³ and 1 - 2⁻⁵³, rounded outward
SMALLEST_GUMBEL = -3.61
LARGEST_GUMBEL = 36.74


def random_bits(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.uint64]:
    """64 random bits for each of `token_ids` [n] -> [n]. `seed` counts modulo 2⁶⁴; position and token ids are not negative."""
    state = _mix_int(_mix_int(seed + _GAMMA) + (position + 1) * _GAMMA)
    bits = token_ids.astype(np.uint64)
    for start in range(0, bits.size, _SLICE):
        x = bits[start : start + _SLICE]
        x *= np.uint64(_GAMMA)
        x += np.uint64((state + _GAMMA) & _MASK)
        _mix(x)
    return bits


def gumbel(seed: int, position: int, token_ids: NDArray[np.int64]) -> NDArray[np.float64]:
    """A standard Gumbel variable for each of `token_ids` [n] -> [n]: -ln(-ln(u)), u uniform in the midpoints of 2⁵² equal parts of (0, 1).

    The largest of logit + gumbel is a draw from softmax(logits) (Gumbel 1954; Maddison, Tarlow & Minka, arXiv:1411.0030).
    """
    bits = random_bits(seed, position, token_ids)
    for start in range(0, bits.size, _SLICE):
        x = bits[start : start + _SLICE]
        x >>= np.uint64(12)
        x |= np.uint64(0x3FF0000000000000)  # the bits of a float64 in [1, 2): its fraction is the random number
        u = x.view(np.float64)
        u -= 1.0 - 2.0**-53  # exact: never 0, never 1
        np.log(u, out=u)
        np.negative(u, out=u)
        np.log(u, out=u)
        np.negative(u, out=u)
    return bits.view(np.float64)


def _mix(x: NDArray[np.uint64]) -> None:
    """SplitMix64's finalizer (Stafford's variant 13), in place: a bijection in which every output bit depends on every input bit."""
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
