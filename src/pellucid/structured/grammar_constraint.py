"""The state of one output under a compiled grammar."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import RequestError

if TYPE_CHECKING:
    import llguidance

__all__ = ["GrammarConstraint"]


class GrammarConstraint:
    """A `Constraint` (constraint.py) over a matcher of llguidance."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int, kind: str) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._kind = kind

    def masks(self, draft_token_ids: Sequence[int]) -> list[NDArray[np.bool_] | None]:
        """See `Constraint.masks`."""
        mask = self._mask(self._matcher)
        masks: list[NDArray[np.bool_] | None] = [mask]
        if not draft_token_ids:
            return masks
        # Follow the drafts in a copy: an error there is none of the answer so far.
        ahead = self._matcher.deep_copy()
        for i, token_id in enumerate(draft_token_ids):
            if ahead.is_stopped() or token_id >= len(mask) or not mask[token_id]:
                return masks + [None] * (len(draft_token_ids) - i)
            if not ahead.try_consume_tokens([token_id]):
                break
            try:
                mask = self._mask(ahead)
            except RequestError:
                break
            masks.append(mask)
        return masks

    def advance(self, token_id: int) -> bool:
        """See `Constraint.advance`."""
        self._matcher.consume_token(token_id)
        # if it fails, the matcher reports that at its next mask
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> "GrammarConstraint":
        """See `Constraint.copy`."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._kind)

    def _mask(self, matcher: "llguidance.LLMatcher") -> NDArray[np.bool_]:
        """The tokens that may come next: bool [V] of the tokenizer's vocabulary."""
        bits = matcher.compute_bitmask()
        if matcher.is_error():
            reason = " ".join(matcher.get_error().split())[:300]
            raise RequestError(
                f"structured_outputs.{self._kind} exceeds what a step may compute: {reason}"
            )
        packed = np.frombuffer(bits, np.uint8)
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(np.bool_)
