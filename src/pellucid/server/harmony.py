"""Reads harmony, the form in which gpt-oss answers: messages in channels.

    <|channel|>analysis<|message|>…<|end|>                                       reasoning
    <|start|>assistant<|channel|>final<|message|>…<|return|>                     the answer
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>

The prompt ends with `<|start|>assistant`. A call's recipient may also stand before the channel.
Reference: OpenAI's harmony format.
"""

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

__all__ = ["REASONING_END", "HarmonyReader", "is_harmony", "with_thinking"]

REASONING_END = "<|end|>"
_MESSAGE = "<|message|>"
_ENDS = (REASONING_END, "<|return|>", "<|call|>", "<|start|>", "<|endoftext|>")
_HEADS = ("<|channel|>", "<|start|>", _MESSAGE, " to=", "to=")  # how a header begins
_MAX_HEADER = 512  # characters
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.-]+)")


def is_harmony(chat_template: str | None) -> bool:
    """True where a model's chat template writes harmony."""
    return (
        chat_template is not None and "<|channel|>" in chat_template and _MESSAGE in chat_template
    )


def with_thinking(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message for a harmony template, which calls the reasoning of a call `thinking` and takes
    no text beside it.
    """
    reasoning, is_call = message.get("reasoning_content"), bool(message.get("tool_calls"))
    if not isinstance(reasoning, str) or (is_call and message.get("content")):
        return message
    return {**message, "thinking": reasoning}


class HarmonyReader:
    """Give it each new piece of text, then `finish`; both return what is new of the reasoning and
    of the answer. A call of a known tool is part of the answer, as `<tool_call>` with JSON. Calls
    of other tools, which the model was not offered, count as reasoning.
    """

    def __init__(self, names: Collection[str]) -> None:
        """`names`: the tools of the request."""
        self._names = names
        self._held = ""  # not read yet
        self._in_header = True
        self._is_reasoning = False  # the message that is being read
        self._closing = ""  # what ends the message that is being read, if it is a call

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece of the text."""
        return self._read(text, is_whole=False)

    def finish(self) -> tuple[str, str]:
        """Take the end of the text."""
        return self._read("", is_whole=True)

    def _read(self, text: str, *, is_whole: bool) -> tuple[str, str]:
        self._held += text
        reasoning: list[str] = []
        answer: list[str] = []
        is_waiting = False
        while not is_waiting and self._held:
            if self._in_header:
                is_waiting = self._read_header(answer, is_whole=is_whole)
            else:
                is_waiting = self._read_message(reasoning, answer, is_whole=is_whole)
        return "".join(reasoning), "".join(answer)

    def _read_header(self, answer: list[str], *, is_whole: bool) -> bool:
        """Read what says whose message follows. True where more text must come first."""
        held = self._held
        # A text that is in no channel is the answer.
        if not any(head.startswith(held[: len(head)]) for head in _HEADS):
            self._in_header = self._is_reasoning = False
            return False
        header, tag, rest = held.partition(_MESSAGE)
        if not tag:
            if len(held) <= _MAX_HEADER and not is_whole:
                return True
            # a header that does not end, or one that was cut off, says nothing
            self._held, self._in_header, self._is_reasoning = "", is_whole, False
            if not is_whole:
                answer.append(held)
            return is_whole
        # The recipient and the channel say what the message is.
        channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
        self._held, self._in_header = rest, False
        self._is_reasoning = recipient is not None or (
            channel is not None and channel[1] == "analysis"
        )
        if recipient is not None and recipient[1] in self._names:
            self._is_reasoning, self._closing = False, "}</tool_call>"
            answer.append(f'<tool_call>{{"name": {json.dumps(recipient[1])}, "arguments": ')
        return False

    def _read_message(self, reasoning: list[str], answer: list[str], *, is_whole: bool) -> bool:
        """Read on in a message. True where more text must come first."""
        held = self._held
        end = min((place for tag in _ENDS if (place := held.find(tag)) >= 0), default=None)
        kept = 0 if is_whole else _overlap(held)  # may be the beginning of an end
        shown = len(held) - kept if end is None else end
        (reasoning if self._is_reasoning else answer).append(held[:shown])
        self._held = held[shown:]
        if end is None and not is_whole:
            return True
        # The message has ended: the role of the next one is passed over.
        if end is not None:
            answer.append(self._closing)
            self._closing = ""
            tag = next(tag for tag in _ENDS if self._held.startswith(tag))
            if tag != "<|start|>":
                self._held = self._held[len(tag) :]
            self._in_header = True
        return end is None


def _overlap(text: str) -> int:
    """How many last characters may be the beginning of a tag that ends a message."""
    longest = min(len(text), max(map(len, _ENDS)) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in _ENDS)), 0
    )
