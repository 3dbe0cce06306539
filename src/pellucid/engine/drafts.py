"""The interface of a proposer of drafts, and the check of its drafts.

Drafts only save steps. So if a proposer raises, or returns anything but lists of the model's token
ids, no request fails: the core logs one warning and does not call it again.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from ..checks import show
from ..errors import EngineError
from ..request import Request

__all__ = ["Proposer", "check_drafts"]

# Requests that decode -> draft tokens, by request_id. Requests that it leaves out get none.
Proposer: TypeAlias = Callable[[Sequence[Request]], Mapping[str, list[int]]]


def check_drafts(
    proposed: object, decoding: Sequence[Request], vocab_size: int, limit: int
) -> dict[str, list[int]]:
    """The first `limit` drafts of each request that decodes. Raises EngineError unless `proposed`
    is a mapping of request ids to lists of token ids.
    """
    if not isinstance(proposed, Mapping):
        raise EngineError(f"it gave {show(proposed)} and no mapping of request ids to drafts")
    drafts: dict[str, list[int]] = {}
    for request in decoding:
        ids = proposed.get(request.request_id, [])
        if not isinstance(ids, list):
            raise EngineError(f"for {request.request_id!r} it gave {show(ids)} and no list")
        drafts[request.request_id] = ids = ids[:limit]
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise EngineError(
                    f"for {request.request_id!r} it drafted {show(token_id)}; a token id is an "
                    f"integer between 0 and {vocab_size - 1}"
                )
    return drafts
