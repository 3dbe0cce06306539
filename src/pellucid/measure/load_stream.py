"""Reads the stream of an OpenAI-compatible answer: server-sent events, and when its tokens came.

    data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}     no token
    data: {"choices": [{"delta": {"content": " sea"}}]}                      one token, or several
    data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 40}}
    data: [DONE]

How many tokens a chunk holds is taken from the best source that the server offers: a usage in each
chunk, logprobs in each chunk, or else the usage at the end, shared among chunks by the length of
their text. Without any usage each chunk counts as one token, and the answer says so.

Reference: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "EventReader", "StreamError", "error_sentence"]

MAX_EVENT = 4 << 20  # bytes
MAX_CHUNKS = 1_000_000
MAX_SENTENCE = 300  # characters of a server's message that are kept
DONE = "[DONE]"

# Fields of a message that hold generated text.
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


class StreamError(Exception):
    """The stream broke off, told an error, or is none. `kind`: a few words to count by."""

    def __init__(self, kind: str, sentence: str) -> None:
        super().__init__(sentence)
        self.kind = kind


class EventReader:
    """Splits bytes into the data of events. The bytes may be cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""  # of the last line, what has come
        self._data: list[bytes] = []
        self._num_bytes = 0  # of the event that has begun

    def feed(self, piece: bytes) -> list[str]:
        """The data of each event that `piece` ends. Raises StreamError for an event too long."""
        lines = (self._rest + piece).splitlines(keepends=True)
        # A lone \r at the end may be half of \r\n.
        self._rest = b""
        if lines and not lines[-1].endswith(b"\n"):
            self._rest = lines.pop()
        found = []
        for line in lines:
            event = self._take(line.rstrip(b"\r\n"))
            if event is not None:
                found.append(event)
        if self._num_bytes + len(self._rest) > MAX_EVENT:
            raise StreamError("no event stream", f"an event has more than {MAX_EVENT} bytes")
        return found

    def end(self) -> list[str]:
        """What is left when the stream ends: some servers leave out the last blank line."""
        found = []
        for line in (self._rest.rstrip(b"\r"), b""):
            event = self._take(line)
            if event is not None:
                found.append(event)
        self._rest = b""
        return found

    def _take(self, line: bytes) -> str | None:
        """One line without its end; the event's data if the line ended it."""
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data.append(value.removeprefix(b" "))
                self._num_bytes += len(value)
            return None  # another field, or a comment that keeps the connection alive
        if not self._data:
            return None
        event = b"\n".join(self._data).decode("utf-8", "replace")
        self._data.clear()
        self._num_bytes = 0
        return event


@dataclass(slots=True)
class Answer:
    """One answer, as its chunks come. Times are of the caller's clock, in seconds."""

    times: list[float] = field(default_factory=list)  # of each chunk that holds tokens
    lengths: list[int] = field(default_factory=list)  # characters of each
    counts: list[int] = field(default_factory=list)  # tokens of each; 0: not told
    prompt_tokens: int | None = None  # from the usage, like the next two
    completion_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    finish_time: float | None = None  # of the chunk that told the reason
    is_done: bool = False  # [DONE] came
    _is_continuous: bool = True  # each chunk that holds tokens came with a usage

    def take(self, event: str, now: float) -> None:
        """Account for the data of one event. Raises StreamError where it tells an error."""
        if self.is_done:
            return
        if event.strip() == DONE:
            self.is_done = True
            return
        try:
            chunk = json.loads(event)
        except (ValueError, RecursionError):
            raise StreamError("no JSON in the stream", f"an event is {event!r:.80}") from None
        if not isinstance(chunk, dict):
            raise StreamError("no JSON in the stream", f"an event is {event!r:.80}")
        if chunk.get("error") is not None or chunk.get("object") == "error":
            raise StreamError("error in the stream", error_sentence(chunk))
        before = self.completion_tokens or 0
        has_usage = self._take_usage(chunk.get("usage"))
        self._take_choices(chunk.get("choices"), before if has_usage else None, now)

    def _take_usage(self, usage: object) -> bool:
        if not isinstance(usage, dict):
            return False
        self.prompt_tokens = _count(usage.get("prompt_tokens"), self.prompt_tokens)
        self.completion_tokens = _count(usage.get("completion_tokens"), self.completion_tokens)
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self.cached_tokens = _count(details.get("cached_tokens"), self.cached_tokens)
        return True

    def _take_choices(self, choices: object, before: int | None, now: float) -> None:
        """`before`: completion tokens until this chunk, if it tells those with it."""
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            return
        choice = choices[0]
        length, count = _text_length(choice), _logprob_count(choice)
        if before is None or self.completion_tokens is None:
            self._is_continuous = self._is_continuous and not length
        elif self._is_continuous:
            count = max(self.completion_tokens - before, 0)
        if length or count:
            if len(self.times) == MAX_CHUNKS:
                raise StreamError("answer too long", f"it has more than {MAX_CHUNKS} chunks")
            self.times.append(now)
            self.lengths.append(length)
            self.counts.append(count)
        reason = choice.get("finish_reason")
        if isinstance(reason, str) and reason:
            self.finish_reason, self.finish_time = reason[:40], now

    def finish(self) -> None:
        """The stream has ended: raises StreamError if that was too early, then divides the tokens
        of the usage among the chunks.
        """
        if not self.is_done and self.finish_reason is None:
            raise StreamError(
                "stream broke off", f"it ended after {len(self.times)} chunks without [DONE]"
            )
        # A token that has no text, such as the end of sequence, came with the reason to finish.
        total = self.completion_tokens
        is_last_silent = total == len(self.times) + 1 and self.finish_reason == "stop"
        is_silent = total is not None and total > 0 and not self.times
        if (is_last_silent or is_silent) and self.finish_time is not None and not any(self.counts):
            self.times.append(self.finish_time)
            self.lengths.append(0)
            self.counts.append(0)
        if self._is_continuous and any(self.counts):
            # Text without a new token belongs to the token before.
            kept = [i for i, count in enumerate(self.counts) if count]
            self.times = [self.times[i] for i in kept]
            self.counts = [self.counts[i] for i in kept]
        elif total is None or not all(self.counts):
            self.counts = _divide(total, self.lengths)

    @property
    def num_tokens(self) -> int:
        """Generated tokens: by the usage, else one for each chunk."""
        return len(self.times) if self.completion_tokens is None else self.completion_tokens


def error_sentence(value: object) -> str:
    """The sentence of an error body: OpenAI's {"error": {"message": …}}, and what others send."""
    for _ in range(4):
        if not isinstance(value, Mapping):
            break
        value = next(
            (value[k] for k in ("error", "message", "detail", "msg") if value.get(k)), str(value)
        )
    return " ".join(str(value).split())[:MAX_SENTENCE]


def _text_length(choice: Mapping[str, Any]) -> int:
    """Characters of generated text in a choice of either endpoint."""
    text = choice.get("text")
    if isinstance(text, str):
        return len(text)
    delta = choice.get("delta")
    if not isinstance(delta, dict):
        return 0
    length = sum(len(delta[name]) for name in _TEXTS if isinstance(delta.get(name), str))
    calls = delta.get("tool_calls")
    for call in calls if isinstance(calls, list) else ():
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict):
            length += sum(len(part) for part in function.values() if isinstance(part, str))
    return length


def _logprob_count(choice: Mapping[str, Any]) -> int:
    """Tokens that the logprobs of a chunk list; 0 without logprobs."""
    logprobs = choice.get("logprobs")
    if not isinstance(logprobs, dict):
        return 0
    rows = logprobs.get("content") or logprobs.get("tokens")
    return len(rows) if isinstance(rows, list) else 0


def _count(value: object, otherwise: int | None) -> int | None:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    return value if is_count else otherwise  # type: ignore[return-value]


def _divide(total: int | None, lengths: list[int]) -> list[int]:
    """Tokens of each chunk: at least 1, the rest of `total` in proportion to `lengths`."""
    surplus = (total or 0) - len(lengths)
    if surplus <= 0:
        return [1] * len(lengths)
    weight = sum(lengths) or len(lengths)
    # Cumulative rounding: parts add up to the surplus, and no chunk is off by more than one.
    counts, passed, given = [], 0, 0
    for length in lengths:
        passed += length if sum(lengths) else 1
        share = surplus * passed // weight - given
        given += share
        counts.append(1 + share)
    return counts
