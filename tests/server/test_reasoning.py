"""Reasoning is split from the answer, however the text is cut into pieces."""

import itertools

import pytest

from pellucid.server.reasoning import ReasoningReader, opens_reasoning

# text, whether the prompt has opened the reasoning: the reasoning and the answer
TEXTS: dict[str, tuple[str, bool, str, str]] = {
    "both": ("<think>\nWhy?\n</think>\n\nSo.", False, "Why?\n", "So."),
    "opened by the prompt": ("\nWhy?\n</think>\n\nSo.", True, "Why?\n", "So."),
    "none": ("So it <is>.", False, "", "So it <is>."),
    "empty": ("<think></think>So.", False, "", "So."),
    "empty, opened": ("</think>So.", True, "", "So."),
    "only blank lines": ("<think>\n\n</think>\n\nSo.", False, "", "So."),
    "broken off": ("<think>Why? </thi", False, "Why? </thi", ""),
    "broken off, opened": ("Why", True, "Why", ""),
    "no answer": ("<think>Why?</think>", False, "Why?", ""),
    "no text": ("", False, "", ""),
    "half a tag": ("<thi", False, "", "<thi"),
    "another tag": ("<thin>a</thin>", False, "", "<thin>a</thin>"),
    "spaces before": (" \n<think>Why?</think>So.", False, "Why?", "So."),
    "later tags": ("So. <think>a</think>", False, "", "So. <think>a</think>"),
    "a tag within": ("<think>a </b> < /think> <</think>So.", False, "a </b> < /think> <", "So."),
    "two ends": ("<think>a</think>b</think>c", False, "a", "b</think>c"),
    "other letters": ("<think>Füße 🙂</think>é", False, "Füße 🙂", "é"),
}


def read(pieces: list[str], *, is_open: bool) -> tuple[str, str]:
    """All of the reasoning, and all of the answer."""
    reader = ReasoningReader(is_open=is_open)
    found = [*map(reader.push, pieces), reader.finish()]
    return "".join(r for r, _ in found), "".join(a for _, a in found)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_split_the_same_wherever_it_is_cut(name: str) -> None:
    text, is_open, reasoning, answer = TEXTS[name]
    assert read([text], is_open=is_open) == (reasoning, answer)
    assert read(list(text), is_open=is_open) == (reasoning, answer)
    for places in itertools.combinations(range(len(text) + 1), 2):
        cuts = [0, *places, len(text)]
        pieces = [text[a:b] for a, b in itertools.pairwise(cuts)]
        assert read(pieces, is_open=is_open) == (reasoning, answer), pieces


def test_reasoning_is_told_as_it_arrives() -> None:
    reader = ReasoningReader(is_open=False)
    assert reader.push("<think>One") == ("One", "")
    assert reader.push(" two</") == (" two", "")
    assert reader.push("think>Three") == ("", "Three")


def test_a_template_may_open_the_reasoning() -> None:
    assert opens_reasoning("…<|im_start|>assistant\n<think>\n")
    assert not opens_reasoning("…<think></think>") and not opens_reasoning(None)
