"""The nodes of the prefix tree, and the result of a search."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

__all__ = ["HOLE", "Match", "Node", "kept"]

HOLE = -1  # marks a missing block or slot


def kept(rows: Iterable[Sequence[int]]) -> list[int]:
    """The blocks or slots of these rows, without the HOLEs."""
    return [block for row in rows for block in row if block != HOLE]


class Node:
    """An edge of the tree and its lower end. `blocks[g][i]` is group g's block of column i. In a
    saved node all blocks are HOLEs, and `slots[g][i]` are the tier's slots.
    """

    __slots__ = ("blocks", "children", "locks", "parent", "salt", "slots", "stamp", "tokens")

    def __init__(
        self, parent: "Node | None", tokens: list[int], blocks: list[list[int]], salt: str = ""
    ) -> None:
        self.parent = parent  # None: a root, or a node that the tree has forgotten
        self.salt = salt  # of a root
        self.tokens = tokens
        self.blocks = blocks
        self.slots: list[list[int]] | None = None
        # by first token, then by the tokens of the first block
        self.children: dict[int, dict[tuple[int, ...], Node]] = {}
        self.locks = 0  # requests whose path ends here, and admissions under way
        self.stamp = 0  # when it was last used

    @property
    def columns(self) -> int:
        return len(self.blocks[0])

    def descendants(self) -> "Iterator[Node]":
        pending = [self]  # a path may be deeper than Python's stack
        while pending:
            for siblings in pending.pop().children.values():
                for child in siblings.values():
                    yield child
                    pending.append(child)


@dataclass(slots=True)
class Match:
    """The cached prefix of a sequence: whole columns, then the first tokens of one more."""

    columns: list[tuple[Node, int]]
    partial: tuple[Node, int] | None  # a column to copy from
    partial_tokens: int
