"""Filters and corrections keep what the logits processors of transformers keep, where there are no
ties (those keep all of them).
"""

from typing import Any

import numpy as np
import pytest

from pellucid.sampling import SamplingRow
from pellucid.sampling.processors import adjust
from pellucid.sampling.sampler import survivors
from pellucid.sampling_params import SamplingParams

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES: list[tuple[dict[str, Any], list[tuple[str, Any]]]] = [
    ({"top_k": 1}, [("TopKLogitsWarper", 1)]),
    ({"top_k": 40}, [("TopKLogitsWarper", 40)]),
    ({"top_k": 3000}, [("TopKLogitsWarper", 3000)]),
    ({"top_p": 0.95}, [("TopPLogitsWarper", 0.95)]),
    ({"top_p": 0.1}, [("TopPLogitsWarper", 0.1)]),
    ({"min_p": 0.05}, [("MinPLogitsWarper", 0.05)]),
    ({"typical_p": 0.9}, [("TypicalLogitsWarper", 0.9)]),
    ({"typical_p": 0.2}, [("TypicalLogitsWarper", 0.2)]),
    (
        {"temperature": 0.5, "top_k": 50, "top_p": 0.9},
        [("TemperatureLogitsWarper", 0.5), ("TopKLogitsWarper", 50), ("TopPLogitsWarper", 0.9)],
    ),
    (
        {"temperature": 2.0, "min_p": 0.1},
        [("TemperatureLogitsWarper", 2.0), ("MinPLogitsWarper", 0.1)],
    ),
    (
        {"top_k": 500, "typical_p": 0.95, "top_p": 0.9, "min_p": 0.02},
        [
            ("TopKLogitsWarper", 500),
            ("TypicalLogitsWarper", 0.95),
            ("TopPLogitsWarper", 0.9),
            ("MinPLogitsWarper", 0.02),
        ],
    ),
]


@pytest.mark.parametrize(("fields", "warpers"), CASES)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_filters_keep_what_transformers_keeps(
    fields: dict[str, Any], warpers: list[tuple[str, Any]], scale: float
) -> None:
    rng = np.random.default_rng(3)
    for _ in range(5):
        logits = (rng.standard_normal(5000) * scale).astype(np.float32)
        scores = torch.from_numpy(logits.astype(np.float64))[None]
        for name, value in warpers:
            scores = getattr(transformers, name)(value)(None, scores)
        expected = np.flatnonzero(np.isfinite(scores[0].numpy()))
        assert np.array_equal(
            survivors(logits, SamplingParams(**fields), float(logits.max()))[0], expected
        )


def test_repetition_penalty_is_that_of_transformers() -> None:
    rng = np.random.default_rng(4)
    logits = rng.standard_normal(100).astype(np.float32)
    prompt, output = [1, 5, 5, 7], [9, 1, 9, 30]
    row = SamplingRow(
        params=SamplingParams(repetition_penalty=1.3),
        seed=0,
        position=8,
        prompt_token_ids=prompt,
        output_token_ids=output,
    )
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    expected = processor(torch.tensor([prompt + output]), torch.from_numpy(logits.copy())[None])[
        0
    ].numpy()
    np.testing.assert_allclose(adjust(logits, row), expected, rtol=1e-6)


def test_banned_sequences_are_those_of_transformers() -> None:
    rng = np.random.default_rng(5)
    processor_of = transformers.NoBadWordsLogitsProcessor
    for _ in range(50):
        logits = rng.standard_normal(12).astype(np.float32)
        history = rng.integers(0, 4, 6).tolist()
        banned = [rng.integers(0, 4, rng.integers(1, 5)).tolist() for _ in range(4)]
        row = SamplingRow(
            params=SamplingParams(),
            seed=0,
            position=6,
            prompt_token_ids=history[:3],
            output_token_ids=history[3:],
            banned_sequences=banned,
        )
        expected = processor_of(banned, eos_token_id=11)(
            torch.tensor([history]), torch.from_numpy(logits.copy())[None]
        )[0].numpy()
        assert np.array_equal(adjust(logits, row), expected)
