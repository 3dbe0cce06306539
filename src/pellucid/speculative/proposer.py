"""The interface of a proposer of drafts, and the check of its drafts.

A draft is a guess of a request's next tokens. The model verifies it, so a wrong draft costs time
and never changes an answer. So if a proposer raises, or returns anything but drafts of the model's
token ids, no request fails: one warning is logged and the proposer is not called again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..checks import show
from ..errors import EngineError
from ..request import Request

__all__ = ["Draft", "Proposer", "check_drafts"]


@dataclass(slots=True)
class Draft:
    """A guess of the next tokens of one request.

    `evidence` has for each token how well it is supported, as an index of the proposer's `priors`.
    The governor learns how often the tokens of each are accepted.
    """

    token_ids: list[int] = field(default_factory=list)
    evidence: list[int] = field(default_factory=list)


class Proposer(Protocol):
    """Drafts tokens for requests that decode. It keeps what it needs of them, by request_id."""

    name: str
    # True: its time is not worth measuring. Otherwise the governor times its drafts, and asks for
    # them only where they promise to be worth it.
    is_free: bool

    @property
    def priors(self) -> Sequence[float]:
        """Of each kind of evidence: the chance that a token is right, before any was verified."""
        ...

    def propose(self, requests: Sequence[Request], limit: int) -> Mapping[str, Draft]:
        """Drafts of at most `limit` tokens, by request_id. Requests that are left out get none."""
        ...

    def finish(self, request: Request) -> None:
        """The request has ended: forget it, or learn from its answer."""
        ...


def check_drafts(
    proposed: object, decoding: Sequence[Request], vocab_size: int, num_evidence: int, limit: int
) -> dict[str, Draft]:
    """The first `limit` tokens of the draft of each request that decodes, as far as its answer can
    take them. Raises EngineError unless `proposed` maps request ids to drafts of token ids.
    """
    if not isinstance(proposed, Mapping):
        raise EngineError(f"it gave {show(proposed)} and no mapping of request ids to drafts")
    drafts: dict[str, Draft] = {}
    for request in decoding:
        if request.request_id not in proposed:
            continue
        draft = proposed[request.request_id]
        if not isinstance(draft, Draft) or not isinstance(draft.token_ids, list):
            raise EngineError(f"for {request.request_id!r} it gave {show(draft)} and no draft")
        # An answer ends with a token that is sampled. A draft must not win by tokens behind that.
        room = min(limit, request.max_tokens - len(request.output_token_ids) - 1)
        token_ids, evidence = draft.token_ids[:room], draft.evidence[:room]
        if not _are_integers(token_ids, vocab_size):
            raise EngineError(
                f"for {request.request_id!r} it drafted {show(token_ids)}; a token id is an "
                f"integer between 0 and {vocab_size - 1}"
            )
        if len(evidence) != len(token_ids) or not _are_integers(evidence, num_evidence):
            raise EngineError(
                f"for {request.request_id!r} it gave the evidence {show(evidence)}; each token of "
                f"a draft needs a number between 0 and {num_evidence - 1}"
            )
        if token_ids:
            drafts[request.request_id] = Draft(token_ids, evidence)
    return drafts


def _are_integers(values: Sequence[object], stop: int) -> bool:
    """True if all are integers from 0 to `stop` - 1."""
    return not values or (
        set(map(type, values)) == {int} and min(values) >= 0 and max(values) < stop  # type: ignore
    )
