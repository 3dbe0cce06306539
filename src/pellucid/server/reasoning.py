"""Splits what a model thinks from what it answers: `<think>…</think>`, as it arrives."""

from collections.abc import Iterable

__all__ = ["THINK_END", "ReasoningReader", "count_reasoning", "opens_reasoning"]

THINK_END = "</think>"
_OPEN, _CLOSE = "<think>", THINK_END


def opens_reasoning(prompt: str | None) -> bool:
    """True where the chat template itself has opened the model's reasoning."""
    return prompt is not None and prompt.rstrip().endswith(_OPEN)


def count_reasoning(tokens: Iterable[bytes], end: str = THINK_END) -> int:
    """How many tokens of an answer with reasoning go to its `end`: all, where it has none yet.
    `tokens`: the bytes of each.
    """
    close, last, count = end.encode(), b"", 0
    for token in tokens:
        count += 1
        last = last[-len(close) :] + token
        if close in last:
            break
    return count


class ReasoningReader:
    """Give it each new piece of text, then `finish`; both return what is new of the reasoning and
    of the answer. Only a text that begins with `<think>` has reasoning.
    """

    def __init__(self, *, is_open: bool) -> None:
        """`is_open`: the reasoning has begun in the prompt."""
        self._held = ""
        self._is_reasoning = is_open
        self._is_answer = False
        self._is_start = True  # of the reasoning: blank lines are left out
        self._is_after = False  # just behind the reasoning: the same

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece of the text."""
        return self._read(text, is_whole=False)

    def finish(self) -> tuple[str, str]:
        """Take the end of the text."""
        return self._read("", is_whole=True)

    def _read(self, text: str, *, is_whole: bool) -> tuple[str, str]:
        self._held += text
        reasoning = ""
        # The text may begin with a tag.
        if not self._is_reasoning and not self._is_answer:
            begin = self._held.lstrip()
            if begin.startswith(_OPEN):
                self._is_reasoning, self._held = True, begin[len(_OPEN) :]
            elif not _OPEN.startswith(begin) or is_whole:
                self._is_answer = True
            else:
                return "", ""
        # The reasoning goes to its closing tag.
        if self._is_reasoning:
            before, tag, after = self._held.partition(_CLOSE)
            if not tag and not is_whole:
                keep = next(
                    (n for n in range(len(_CLOSE) - 1, 0, -1) if before.endswith(_CLOSE[:n])), 0
                )
                before, after = before[: len(before) - keep], before[len(before) - keep :]
            if self._is_start:
                before = before.lstrip("\n")
                self._is_start = not before
            reasoning, self._held = before, after
            if not tag:
                return reasoning, ""
            self._is_reasoning, self._is_answer, self._is_after = False, True, True
        # Everything else is the answer; blank lines between the two are left out.
        answer, self._held = self._held, ""
        if self._is_after:
            answer = answer.lstrip("\n")
            self._is_after = not answer
        return reasoning, answer
