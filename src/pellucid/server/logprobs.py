"""Logprobs in the forms of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from ..outputs import Logprob, LogprobsOnePosition

__all__ = ["chat_logprobs", "prompt_logprobs", "text_logprobs"]


def chat_logprobs(
    token_ids: Sequence[int], rows: Sequence[LogprobsOnePosition], top: int
) -> list[dict[str, Any]]:
    """`logprobs.content` of a chat: an entry per token."""
    return [
        _entry(row[token])
        | {"top_logprobs": [_entry(candidate) for candidate in _likeliest(row, top)]}
        for token, row in zip(token_ids, rows, strict=True)
    ]


def text_logprobs(
    token_ids: Sequence[int],
    rows: Sequence[LogprobsOnePosition | None],
    top: int,
    offset: int,
    first: str = "",
) -> dict[str, Any]:
    """`logprobs` of a completion: four lists. `offset`: characters of text before the first
    token. A row that is None belongs to the first token of an echoed prompt, whose text is
    `first`.
    """
    tokens, values, tops, offsets = [], [], [], []
    for token, row in zip(token_ids, rows, strict=True):
        chosen = None if row is None else row[token]
        text = first if chosen is None else chosen.decoded_token or ""
        tokens.append(text)
        values.append(None if chosen is None else chosen.logprob)
        offsets.append(offset)
        offset += len(text)
        tops.append(
            None
            if row is None
            else {c.decoded_token or "": c.logprob for c in _likeliest(row, top)}
        )
    return {
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": tops,
        "text_offset": offsets,
    }


def prompt_logprobs(
    rows: Sequence[LogprobsOnePosition | None] | None,
) -> list[dict[str, Any] | None] | None:
    """vLLM's form: for each token of the prompt its candidates by token id."""
    if rows is None:
        return None
    return [
        None
        if row is None
        else {
            str(token): {
                "logprob": candidate.logprob,
                "rank": candidate.rank,
                "decoded_token": candidate.decoded_token,
            }
            for token, candidate in row.items()
        }
        for row in rows
    ]


def _likeliest(row: LogprobsOnePosition, top: int) -> list[Logprob]:
    return [candidate for candidate in row.values() if candidate.rank <= top][:top]


def _entry(candidate: Logprob) -> dict[str, Any]:
    data = candidate.token_bytes
    return {
        "token": candidate.decoded_token or "",
        "logprob": candidate.logprob,
        "bytes": None if data is None else list(data),
    }
