"""The law of rejection sampling, by exact enumeration."""

import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from fractions import Fraction

import pytest

from pellucid.speculative.rejection import acceptance, draw, residual, verify

Law = Sequence[Fraction]
V = 3  # the vocabulary
Model = Callable[[tuple[int, ...]], Law]  # the tokens so far -> the law of the next


def random_law(rng: random.Random) -> Law:
    weights = [rng.choice((0, 1, 2, 5)) for _ in range(V)]
    if not any(weights):
        weights[0] = 1
    return [Fraction(w, sum(weights)) for w in weights]


def random_model(seed: int) -> Model:
    return lambda tokens: random_law(random.Random(f"{seed} {tokens}"))


def joint_law(
    target: Model, draft: Model, k: int, replacement: Callable[[Law, Law], Law] = residual
) -> dict[tuple[int, ...], Fraction]:
    """The law of the first k + 1 tokens. Tokens behind a rejection come from the target, as those
    of later steps do.
    """
    law: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)

    def go_on(tokens: tuple[int, ...], weight: Fraction) -> None:
        if len(tokens) == k + 1:
            law[tokens] += weight
            return
        for token_id, probability in enumerate(target(tokens)):
            if probability:
                go_on((*tokens, token_id), weight * probability)

    for drafts in itertools.product(range(V), repeat=k):
        weight = Fraction(1)
        for i, token_id in enumerate(drafts):
            weight *= draft(drafts[:i])[token_id]
        for i in range(k):
            if not weight:
                break
            target_probs, draft_probs = target(drafts[:i]), draft(drafts[:i])
            accept = acceptance(target_probs, draft_probs, drafts[i])
            for token_id, probability in enumerate(replacement(target_probs, draft_probs)):
                if probability and accept < 1:
                    go_on((*drafts[:i], token_id), weight * (1 - accept) * probability)
            weight *= accept
        else:
            go_on(drafts, weight)
    return law


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_joint_law_is_the_targets(k: int) -> None:
    for seed in range(40):
        target, draft = random_model(seed), random_model(seed + 1000)
        found = joint_law(target, draft, k)
        for tokens in itertools.product(range(V), repeat=k + 1):
            expected = Fraction(1)
            for i, token_id in enumerate(tokens):
                expected *= target(tokens[:i])[token_id]
            assert found[tokens] == expected


def test_a_replacement_from_the_target_itself_is_caught() -> None:
    """The mistake that is made most often: the law is another."""
    wrong = [
        joint_law(random_model(s), random_model(s + 1000), 2, lambda p, q: p)
        != joint_law(random_model(s), random_model(s + 1000), 2)
        for s in range(10)
    ]
    assert sum(wrong) > 5


def test_verify_draws_as_the_law_says() -> None:
    """`verify` by enumeration of its uniform numbers: a grid that all probabilities divide."""
    target_probs = [[Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]] * 2
    draft_probs = [[Fraction(1, 4), Fraction(1, 4), Fraction(1, 2)]]
    grid = [Fraction(i, 8) for i in range(8)]
    law: dict[int, Fraction] = defaultdict(Fraction)
    for token_id, first, second in itertools.product(range(V), grid, grid):
        numbers = iter((first, second))
        tokens = verify(target_probs, draft_probs, [token_id], lambda n=numbers: next(n))  # type: ignore[misc]
        law[tokens[0]] += draft_probs[0][token_id] / 64
        assert len(tokens) == 1 or tokens[0] == token_id
    assert [law[t] for t in range(V)] == target_probs[0]


def test_equal_laws_accept_all() -> None:
    law = [Fraction(1, 3)] * 3
    assert residual(law, law) == law
    assert verify([law] * 3, [law] * 2, [0, 2], lambda: Fraction(99, 100)) == [0, 2, 2]


def test_a_law_that_does_not_sum_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1/2, not to 1"):
        draw([Fraction(1, 4), Fraction(1, 4)], Fraction(3, 4))
