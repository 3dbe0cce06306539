"""Rejection sampling of drafts, as Leviathan et al. define it: a reference to read and to prove.

    accept the draft x with probability min(1, target(x) / draft(x))
    after the first rejection, draw from max(0, target - draft), normalized; after none, from target

The tokens then have exactly the law of the target model (arXiv:2211.17192, algorithm 1 and appendix
A.1). The engine itself draws with shared noise instead (decision 34): its tokens are not only of
the same law, they are the same.

Probabilities are fractions, so that the law can be proved by enumeration. V vocabulary, k drafts.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction

__all__ = ["acceptance", "draw", "residual", "verify"]

Law = Sequence[Fraction]  # [V], sums to 1
Uniform = Callable[[], Fraction]  # a number of [0, 1)


def acceptance(target_probs: Law, draft_probs: Law, token_id: int) -> Fraction:
    """The probability with which a draft that was drawn from `draft_probs` is accepted."""
    return min(Fraction(1), target_probs[token_id] / draft_probs[token_id])


def residual(target_probs: Law, draft_probs: Law) -> list[Fraction]:
    """The law of the token that replaces a rejected draft."""
    excess = [max(Fraction(0), p - q) for p, q in zip(target_probs, draft_probs, strict=True)]
    total = sum(excess)
    if not total:  # the laws are equal, and no draft is rejected
        return list(target_probs)
    return [e / total for e in excess]


def draw(law: Law, uniform: Fraction) -> int:
    """The token at which the cumulative law exceeds `uniform`."""
    cumulative = Fraction(0)
    for token_id, probability in enumerate(law):
        cumulative += probability
        if uniform < cumulative:
            return token_id
    raise ValueError(f"the probabilities sum to {cumulative}, not to 1")


def verify(
    target_probs: Sequence[Law],
    draft_probs: Sequence[Law],
    draft_token_ids: Sequence[int],
    uniform: Uniform,
) -> list[int]:
    """The accepted drafts and one more token. `target_probs` [k + 1, V] and `draft_probs` [k, V]
    are the laws at each place, given the drafts before it.
    """
    taken: list[int] = []
    for i, token_id in enumerate(draft_token_ids):
        if uniform() >= acceptance(target_probs[i], draft_probs[i], token_id):
            return [*taken, draw(residual(target_probs[i], draft_probs[i]), uniform())]
        taken.append(token_id)
    bonus_token = draw(target_probs[len(taken)], uniform())
    return [*taken, bonus_token]
