"""The merges that a SentencePiece vocabulary implies. Byte-pair encoding with them gives the same
tokens as its scores.

SentencePiece stores scores, not merges. It repeatedly joins the neighbouring pair whose joined text
is the token with the highest score; the leftmost of equals (Kudo & Richardson, arXiv:1808.06226;
llama.cpp's "SPM"). So every way to cut a token into two tokens is a merge, and merges are ranked by
the scores. Among pairs of equal score SentencePiece takes the leftmost; here the longest piece
ranks first. Vocabularies have equal scores only for runs of spaces, where both rules give the same
tokens.

A vocabulary of 262,000 tokens has 1.2 million cuts, of which 510,000 are merges. They are found by
hashing all prefixes and suffixes at once: with H(c₀c₁…) = Σ cᵢ·bⁱ mod 2⁶⁴, a running sum over the
whole vocabulary gives all hashes. The probability of a false match is about 10⁻⁸ for a whole
vocabulary. The `tokenizers` library would refuse such a merge, as its pair makes no token.

This module does not read files. It returns pairs of texts, the form that the `tokenizers` library
takes.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import FormatError
from .vocabulary import MAX_MERGES

__all__ = ["derive_merges"]

_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse mod 2⁶⁴
_SLOT_BITS = 22  # of the table of hashes: 16 slots for each token of the largest vocabularies


def derive_merges(tokens: Sequence[str], scores: NDArray[np.float64]) -> list[tuple[str, str]]:
    """The merges of `tokens` (distinct, none empty), by rank. `scores` has one finite number per
    token.
    """
    if not tokens:
        return []
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))  # [V]
    ends = np.cumsum(lengths)
    starts = ends - lengths
    # all characters of the vocabulary, end to end: [C]
    chars = np.frombuffer("".join(tokens).encode("utf-32-le"), np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(tokens)), lengths)  # [C] the token of each character
    place = np.arange(len(chars)) - starts[owner]  # [C] its place in the token

    # hash each token by differences of one running sum
    powers, inverses = (
        _powers(_BASE, int(lengths.max())),
        _powers(pow(_BASE, -1, 1 << 64), int(lengths.max())),
    )
    # [C + 1], wraps around
    sums = np.concatenate(
        [np.zeros(1, np.uint64), np.cumsum((chars + np.uint64(1)) * powers[place])]
    )
    whole = sums[ends] - sums[starts]  # [V] hash of each token

    # hash both parts of each cut, and drop cuts whose parts are not in the table
    cuts = np.flatnonzero(place)  # a cut lies before each character but a token's first
    prefix = sums[cuts] - sums[starts[owner[cuts]]]
    suffix = (sums[ends[owner[cuts]]] - sums[cuts]) * inverses[place[cuts]]
    table = np.full(1 << _SLOT_BITS, -1, np.int32)
    table[_slot(whole)] = np.arange(len(tokens))
    likely = np.flatnonzero((table[_slot(prefix)] >= 0) & (table[_slot(suffix)] >= 0))
    cuts, prefix, suffix = cuts[likely], prefix[likely], suffix[likely]

    # keep cuts of which both parts are tokens
    left, right = _find(prefix, whole, table), _find(suffix, whole, table)
    real = (whole[left] == prefix) & (whole[right] == suffix)
    if (count := int(real.sum())) > MAX_MERGES:
        raise FormatError(
            f"the vocabulary implies {count} merges; there may be at most {MAX_MERGES}"
        )
    left, right, made = left[real], right[real], owner[cuts[real]]

    # rank by score, then by length of the whole, then of the left part
    ranks = np.lexsort((-lengths[left], -lengths[made], -scores[made]))
    texts = np.array(tokens, object)
    return list(zip(texts[left[ranks]].tolist(), texts[right[ranks]].tolist(), strict=True))


def _find(
    hashes: NDArray[np.uint64], whole: NDArray[np.uint64], table: NDArray[np.int32]
) -> NDArray[np.int64]:
    """For each of `hashes` the token that has it, or any token if none has. Most are found in the
    table, the rest by a search.
    """
    found = table[_slot(hashes)].astype(np.int64)
    missed = np.flatnonzero(whole[found] != hashes)
    order = np.argsort(whole)
    found[missed] = order[
        np.minimum(np.searchsorted(whole, hashes[missed], sorter=order), len(order) - 1)
    ]
    return found


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """base⁰ … baseᶜᵒᵘⁿᵗ⁻¹ mod 2⁶⁴."""
    return np.cumprod(np.array([1] + [base] * (count - 1), np.uint64), dtype=np.uint64)


def _slot(hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The place of a hash in the table: its high bits, after a multiplication that mixes in the low
    ones.
    """
    return (hashes * np.uint64(_BASE)) >> np.uint64(64 - _SLOT_BITS)
