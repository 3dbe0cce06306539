"""Every family against the logits that transformers computed with the same weights (tests/golden/models), on the reference backend.

And against itself: in chunks, through shuffled cache blocks, beside other requests, it computes what it computes in one go.
"""

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .harness import GOLDEN, GOLDEN_NAMES, RELATIVE_BUDGET, Chunk, Loaded, Session, check_close, load

PARTS: dict[str, list[tuple[str, Any]]] = {  # what makes a family itself -> config fields without it
    "llama-bias-linear": [("rope", {"scaling": "none"})],
    "llama3": [("rope", {"scaling": "none"})],
    "llama-yarn": [("rope", {"scaling": "none"}), ("rope", {"attention_factor": 1.0}), ("rope", {"beta_slow": 0.6})],
    "mistral": [("windows", (None, None)), ("windows", (9, 9))],
    "qwen2": [("windows", (None, None)), ("windows", (8, 8))],
    "qwen3": [("qk_norm", False), ("norm_eps", 1e-3)],
    "gemma2": [("attn_softcap", None), ("final_softcap", None), ("softmax_scale", None), ("embedding_scale", 1.0)],
    "gemma3": [("rope_local", None), ("rope", {"scaling": "none"}), ("windows", (8, 8, 8)), ("qk_norm", False), ("activation", "silu")],
    "gpt2": [("norm_eps", 1e-3)],
    "llama": [("rope", {"theta": 9_000.0})],
}


@pytest.fixture(scope="module", params=[(name, "reference") for name in GOLDEN_NAMES], ids="-".join)
def golden(request: pytest.FixtureRequest) -> tuple[str, Loaded, NDArray[np.int32], NDArray[np.float32]]:
    """A golden model's name, the model, its input_ids [T] and its logits [T, V]."""
    name, backend = request.param
    expected = np.load(GOLDEN / name / "expected.npz")
    return name, load(GOLDEN / name, backend), expected["input_ids"], expected["logits"]


Golden = tuple[str, Loaded, NDArray[np.int32], NDArray[np.float32]]


def test_logits_equal_those_of_transformers(golden: Golden) -> None:
    _, loaded, input_ids, expected = golden
    check_close(Session(loaded).prefill(input_ids), expected)


def test_every_part_of_a_family_shows_in_its_logits(golden: Golden) -> None:
    """So that the test above can fail: with one part left out or changed, logits are off by a hundred times the budget or more."""
    name, loaded, input_ids, expected = golden
    for field, changed in PARTS[name]:
        value = dataclasses.replace(getattr(loaded.config, field), **changed) if isinstance(changed, dict) else changed
        other = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, **{field: value}))
        error = np.abs(Session(other).prefill(input_ids) - expected).max()
        assert error > 100 * RELATIVE_BUDGET * np.abs(expected).max(), f"{field} = {changed} shows by {error:.2g} only"


@pytest.mark.parametrize("sizes", [(1,), (3,), (7,), (13, 1, 1, 1), (39, 1)], ids=str)
def test_chunks_through_the_cache_give_the_logits_of_one_pass(golden: Golden, sizes: tuple[int, ...]) -> None:
    _, loaded, input_ids, expected = golden
    session = Session(loaded, seed=1)
    blocks = session.take_blocks(len(input_ids))
    found: list[NDArray[np.float32]] = []
    start = 0
    while start < len(input_ids):
        stop = start + sizes[len(found) % len(sizes)]
        found.append(session.run([Chunk(input_ids[start:stop], start, blocks)]))
        start = stop
    check_close(np.concatenate(found), expected)


def test_a_ragged_batch_gives_each_request_its_own_logits(golden: Golden) -> None:
    """Three requests, of which one is new, one goes on in a chunk and one decodes a single token."""
    _, loaded, input_ids, expected = golden
    session = Session(loaded, seed=2)
    rng = np.random.default_rng(3)
    others = [rng.integers(0, loaded.config.vocab_size, n).astype(np.int32) for n in (29, 18)]
    alone = [Session(loaded).prefill(ids) for ids in others]
    blocks = [session.take_blocks(len(ids)) for ids in (input_ids, *others)]
    session.run([Chunk(input_ids[:11], 0, blocks[0]), Chunk(others[0][:28], 0, blocks[1])])
    logits = session.run([Chunk(others[1], 0, blocks[2]), Chunk(input_ids[11:], 11, blocks[0]), Chunk(others[0][28:], 28, blocks[1])])
    check_close(logits[:18], alone[1])
    check_close(logits[18:47], expected[11:])
    check_close(logits[47:], alone[0][28:])


def test_only_the_rows_asked_for_are_projected_to_logits(golden: Golden) -> None:
    _, loaded, input_ids, expected = golden
    session = Session(loaded)
    logits = session.run([Chunk(input_ids, 0, session.take_blocks(len(input_ids)))], logits_indices=[4, 39])
    check_close(logits, expected[[4, 39]])
