"""Rotary frequencies against the formulas of their papers, evaluated here by hand; against
transformers, see tests/models.
"""

import math
from typing import Any

import pytest

from pellucid.config import RopeConfig
from pellucid.errors import ConfigError
from pellucid.models.rope import build_rope_table


def inv_freq(**fields: Any) -> tuple[float, ...]:
    return build_rope_table(RopeConfig(**{"rotary_dim": 8, "theta": 10_000.0, **fields})).inv_freq


def test_plain_frequencies_fall_geometrically_from_one() -> None:
    assert inv_freq() == pytest.approx([1.0, 0.1, 0.01, 0.001])
    assert build_rope_table(RopeConfig(rotary_dim=8)).scale == 1.0


def test_linear_slows_every_pair_by_the_factor() -> None:
    assert inv_freq(scaling="linear", factor=4.0) == pytest.approx([0.25, 0.025, 0.0025, 0.00025])


def test_factors_divide_each_pair_by_its_own() -> None:
    assert inv_freq(scaling="factors", freq_factors=(1.0, 2.0, 4.0, 8.0)) == pytest.approx(
        [1.0, 0.05, 0.0025, 0.000125]
    )


def test_llama3_keeps_short_wavelengths_and_slows_long_ones_in_full() -> None:
    """Trained on 1000 tokens the pairs turn 159, 15.9, 1.59 and 0.159 times: the third lies between
    1 and 4 turns.
    """
    found = inv_freq(
        scaling="llama3",
        factor=8.0,
        original_max_position_embeddings=1000,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    keep = (1000 * 0.01 / (2 * math.pi) - 1) / 3
    assert found == pytest.approx([1.0, 0.1, keep * 0.01 + (1 - keep) * 0.01 / 8, 0.001 / 8])


def test_yarn_keeps_pairs_that_turn_often_and_slows_those_that_hardly_turn() -> None:
    """Trained on 1000 tokens, pair 0.69 turns 32 times and pair 2.2 once: the ramp runs from 0 to
    3.
    """
    table = build_rope_table(
        RopeConfig(rotary_dim=8, scaling="yarn", factor=4.0, original_max_position_embeddings=1000)
    )
    plain = [1.0, 0.1, 0.01, 0.001]
    slowed = [0.0, 1 / 3, 2 / 3, 1.0]
    assert table.inv_freq == pytest.approx(
        [f * (1 - s) + f / 4 * s for f, s in zip(plain, slowed, strict=True)]
    )
    assert table.scale == pytest.approx(0.1 * math.log(4.0) + 1.0)


def test_yarn_scale_is_the_files_where_it_gives_one() -> None:
    config = RopeConfig(
        rotary_dim=8,
        scaling="yarn",
        factor=4.0,
        original_max_position_embeddings=1000,
        attention_factor=1.25,
    )
    assert build_rope_table(config).scale == 1.25


def test_yarn_with_a_ramp_of_no_width_is_a_step() -> None:
    found = inv_freq(
        scaling="yarn", factor=4.0, original_max_position_embeddings=2, beta_fast=2.0, beta_slow=1.0
    )  # no pair turns even once
    assert found == pytest.approx([1.0, 0.025, 0.0025, 0.00025])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rotary_dim": 7}, "rotary_dim is 7"),
        ({"rotary_dim": 0}, "rotary_dim is 0"),
        ({"theta": 1.0}, "theta is 1.0"),
        ({"theta": float("nan")}, "theta is nan"),
        ({"theta": float("inf")}, "theta is inf"),
        ({"factor": 0.0}, "factor is 0.0"),
        ({"factor": 1e300, "scaling": "linear"}, "factor is 1e"),
        ({"scaling": "yarn"}, "needs original_max_position_embeddings"),
        (
            {"scaling": "yarn", "original_max_position_embeddings": 8, "beta_slow": -1.0},
            "beta_slow is -1.0",
        ),
        (
            {"scaling": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
            "low_freq_factor is 4.0",
        ),
        ({"scaling": "factors", "freq_factors": (1.0,)}, "has 1 freq_factors"),
        ({"scaling": "factors", "freq_factors": (1.0, 1.0, 0.0, 1.0)}, "freq_factor"),
        ({"scaling": "factors", "freq_factors": (1.0, 1.0, float("nan"), 1.0)}, "freq_factor"),
    ],
)
def test_impossible_values_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RopeConfig(**{"rotary_dim": 8, **fields})
