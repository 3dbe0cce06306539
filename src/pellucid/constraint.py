"""`Constraint`: the engine's interface to the constraint on one request's output.

The engine asks for the tokens that may follow, and reports the token that was taken. `structured/`
builds constraints from JSON Schemas, regexes and grammars.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Constraint"]


class Constraint(Protocol):
    """The state of one output. Not thread-safe: one caller at a time."""

    def masks(self, draft_token_ids: Sequence[int]) -> "list[NDArray[np.bool_] | None]":
        """The tokens that may come next, as bool [V] or shorter, and those that may follow each
        draft: 1 + len(draft_token_ids) masks. None behind a draft that may not be drawn. Fewer
        masks if one behind a draft cannot be computed. The state does not change.

        Raises RequestError if the first mask cannot be computed within the constraint's limits.
        """
        ...

    def advance(self, token_id: int) -> bool:
        """Add a token that was drawn. True if the output is complete: no token may follow."""
        ...

    def copy(self) -> "Constraint":
        """An independent constraint in the same state."""
        ...
