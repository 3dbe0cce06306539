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
        masks: list[NDArray[np.bool_] | None] = [self._mask()]
        # Advance along the drafts as far as they are allowed, then roll back.
        num_taken = 0
        for token_id in draft_token_ids:
            if self._matcher.is_stopped() or not self._matcher.try_consume_tokens([token_id]):
                break
            num_taken += 1
            masks.append(self._mask())
        if num_taken:
            self._matcher.rollback(num_taken)
        masks += [None] * (1 + len(draft_token_ids) - len(masks))
        return masks

    def advance(self, token_id: int) -> bool:
        """See `Constraint.advance`."""
        self._matcher.consume_token(token_id)
        # if it fails, the matcher reports that at its next mask
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def copy(self) -> "GrammarConstraint":
        """See `Constraint.copy`."""
        return GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._kind)

    def _mask(self) -> NDArray[np.bool_]:
        """The tokens that may come next: bool [V] of the tokenizer's vocabulary."""
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:300]
            raise RequestError(
                f"structured_outputs.{self._kind} exceeds what a step may compute: {reason}"
            )
        packed = np.frombuffer(bits, np.uint8)
        return np.unpackbits(packed, count=self._vocab_size, bitorder="little").view(np.bool_)
