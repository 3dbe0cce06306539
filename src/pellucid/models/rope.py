"""Rotary position embedding (Su et al., arXiv:2104.09864): from a `RopeConfig` to the frequencies
that a kernel needs, as plain Python numbers.

Dimension pair i of a head turns by the angle position · inv_freq[i], where inv_freq[i] =
theta^(-2i/d) and d = rotary_dim. To extend the context beyond training, every method lowers
frequencies. They differ in which ones they lower:

    none     none of them
    linear   all, by `factor` (position interpolation: Chen et al., arXiv:2306.15595)
    yarn     pairs that turn often within the training context stay; those that hardly turn are
             slowed by `factor`, with a ramp between; cos and sin are multiplied by
             0.1·ln(factor) + 1 (Peng et al., arXiv:2309.00071)
    llama3   short wavelengths stay; long ones are slowed by `factor`, with a smooth passage between
             (Llama 3.1)
    factors  each pair by a factor of its own, from the file (LongRoPE: arXiv:2402.13753)

Frequencies never depend on the length of a sequence, so cached keys stay valid.
"""

import math

from ..config import RopeConfig
from ..ops.protocol import RopeTable

__all__ = ["build_rope_table"]


def build_rope_table(config: RopeConfig) -> RopeTable:
    """The rotary frequencies of `config` -> inv_freq [rotary_dim / 2] and the scale of cos and
    sin.
    """
    d, factor = config.rotary_dim, config.factor
    inv_freq = [config.theta ** (-2 * i / d) for i in range(d // 2)]
    if config.scaling == "linear":
        inv_freq = [f / factor for f in inv_freq]
    elif config.scaling == "factors":
        inv_freq = [f / own for f, own in zip(inv_freq, config.freq_factors, strict=True)]
    elif config.scaling == "llama3":
        inv_freq = [_llama3(f, config) for f in inv_freq]
    elif config.scaling == "yarn":
        low, high = _yarn_range(config)
        inv_freq = [
            _blend(f / factor, f, 1.0 - _clamp((i - low) / (high - low)))
            for i, f in enumerate(inv_freq)
        ]
    if config.scaling in ("yarn", "factors") and config.attention_factor is not None:
        return RopeTable(tuple(inv_freq), config.attention_factor)
    if config.scaling == "yarn":
        return RopeTable(tuple(inv_freq), 0.1 * math.log(max(factor, 1.0)) + 1.0)
    return RopeTable(tuple(inv_freq))


def _llama3(inv_freq: float, config: RopeConfig) -> float:
    """`turns` is how often the pair turns within the training context. Above `high_freq_factor` it
    stays, below `low_freq_factor` it is slowed by `factor`.
    """
    turns = config.original_max_position_embeddings * inv_freq / (2 * math.pi)
    keep = (turns - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    return _blend(inv_freq / config.factor, inv_freq, _clamp(keep))


def _yarn_range(config: RopeConfig) -> tuple[float, float]:
    """The first and the last pair of the ramp: those that turn `beta_fast` and `beta_slow` times
    within the training context.
    """

    def pair_that_turns(times: float) -> float:
        wavelength = config.original_max_position_embeddings / (times * 2 * math.pi)
        return config.rotary_dim * math.log(wavelength) / (2 * math.log(config.theta))

    low, high = pair_that_turns(config.beta_fast), pair_that_turns(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.rotary_dim - 1)
    return low, high if high != low else high + 0.001  # a ramp of no width becomes a step


def _blend(slowed: float, kept: float, keep: float) -> float:
    return slowed * (1.0 - keep) + kept * keep


def _clamp(x: float) -> float:
    return min(max(x, 0.0), 1.0)
