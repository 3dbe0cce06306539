"""A mask of allowed tokens (constrained output): no other token is drawn, nothing else changes."""

from typing import Any

import numpy as np
import pytest

from pellucid.errors import RequestError
from pellucid.sampling import SamplingRow, sample, top_logprobs
from pellucid.sampling_params import SamplingParams

V = 1000
MIX: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "repetition_penalty": 2.0},
    {},
    {"temperature": 5.0, "presence_penalty": 1.0},
    {"top_k": 40},
    {"top_p": 0.5, "min_p": 0.01},
    {"typical_p": 0.7},
    {"logit_bias": {3: 100.0}},
]


def build_row(fields: dict[str, Any], seed: int, mask: Any = None) -> SamplingRow:
    return SamplingRow(
        params=SamplingParams(**fields),
        seed=seed,
        position=5,
        prompt_token_ids=[1, 2],
        output_token_ids=[3, 4, 5],
        allowed_mask=mask,
    )


@pytest.mark.parametrize("fields", MIX)
def test_only_allowed_tokens_are_drawn_as_if_the_others_had_no_logit(
    fields: dict[str, Any],
) -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        logits = rng.normal(0, 2, (1, V)).astype(np.float32)
        mask = rng.random(V) < 0.1
        without = np.where(mask, logits, np.float32(-np.inf)).astype(np.float32)
        (token,) = sample(logits, [build_row(fields, seed, mask)])
        assert isinstance(token, int) and mask[token]
        assert token == sample(without, [build_row(fields, seed)])[0]
        assert sample(logits, [build_row(fields, seed, np.ones(V, np.bool_))]) == sample(
            logits, [build_row(fields, seed)]
        )


def test_tokens_beyond_a_mask_may_not_be_drawn() -> None:
    logits = np.arange(V, dtype=np.float32)[None]
    row = build_row({"temperature": 0}, 0, np.ones(10, np.bool_))
    assert sample(logits, [row]) == [9]


def test_a_mask_that_other_bans_leave_empty_fails_its_row_alone() -> None:
    logits = np.zeros((2, V), np.float32)
    mask = np.zeros(V, np.bool_)
    mask[7] = True
    fields = {"temperature": 0, "allowed_token_ids": [8]}
    failed, other = sample(logits, [build_row(fields, 0, mask), build_row(fields, 0)])
    assert isinstance(failed, RequestError) and "the output's constraint" in str(failed)
    assert other == 8


def test_a_mask_changes_neither_the_logits_nor_the_logprobs() -> None:
    logits = np.random.default_rng(0).normal(0, 2, (1, V)).astype(np.float32)
    logits.flags.writeable = False
    mask = np.zeros(V, np.bool_)
    mask[7] = True
    (token,) = sample(logits, [build_row({}, 0, mask)])
    assert token == 7
    (row,) = top_logprobs(logits, [7], [1])
    assert isinstance(row, dict) and 0 < np.exp([c.logprob for c in row.values()]).sum() < 1


def test_nan_in_the_models_logits_is_not_hidden_by_a_mask() -> None:
    logits = np.zeros((1, V), np.float32)
    logits[0, 3] = np.nan
    (failed,) = sample(logits, [build_row({}, 0, np.arange(V) == 7)])
    assert isinstance(failed, RequestError) and "nan" in str(failed)
