"""The scheduler's decisions, as plain data: enough to replay a run or to plot it.

Each decision is a row; the tokens that a step computes are one row for all its requests. The
scheduler itself never reads the log. The oldest rows are dropped.
"""

from typing import Literal, NamedTuple

__all__ = ["MAX_EVENTS", "Event", "EventKind"]

MAX_EVENTS = 1 << 12  # a few thousand steps; each row may name all running requests

EventKind = Literal["add", "admit", "resume", "schedule", "preempt", "finish"]


class Event(NamedTuple):
    """One decision about one or more requests. What `num_tokens` counts, for each of them:

    add       tokens of the prompt
    admit     tokens that the cache had already, for a request that starts
    resume    the same, for one that was preempted
    schedule  tokens that this step computes; the last row of its step
    preempt   tokens whose keys and values the request gives up
    finish    tokens of prompt and output
    """

    step: int
    kind: EventKind
    request_ids: tuple[str, ...]
    num_tokens: tuple[int, ...]
