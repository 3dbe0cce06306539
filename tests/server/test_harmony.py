"""Harmony's channels are split into reasoning, answer and calls, however the text is cut."""

import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest

from pellucid.server.harmony import HarmonyReader, is_harmony, with_thinking
from tests.engine import conftest as engine_conftest
from tests.server.conftest import Server, serving

THINKING = "<|channel|>analysis<|message|>Why?<|end|><|start|>assistant"
CALL = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'

# text: the reasoning and the answer, where the tool `f` is offered
TEXTS: dict[str, tuple[str, str, str]] = {
    "both": (f"{THINKING}<|channel|>final<|message|>So.<|return|>", "Why?", "So."),
    "a call": (f"{THINKING}<|channel|>commentary to=functions.f <|constrain|>json<|message|>"
               '{"a": 1}<|call|>', "Why?", CALL),
    "a call in the role": (f"{THINKING} to=functions.f<|channel|>commentary json<|message|>"
                           '{"a": 1}<|call|>', "Why?", CALL),
    "a call at once": (' to=functions.f<|channel|>commentary<|message|>{"a": 1}<|call|>', "", CALL),
    "two calls": ('<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|><|start|>'
                  'assistant<|channel|>commentary to=functions.f<|message|>{"a": 1}<|call|>', "",
                  CALL + CALL),
    "a call without its end": ('<|channel|>commentary to=functions.f<|message|>{"a": 1}', "",
                               CALL[: -len("}</tool_call>")]),
    "a tool that was not offered": ("<|channel|>commentary to=browser.search<|message|>{}<|call|>",
                                    "{}", ""),
    "words before a call": ("<|channel|>commentary<|message|>See:<|end|><|start|>"
                            "assistant<|channel|>final<|message|>So.", "", "See:So."),
    "no channels": ("So it <is>.", "", "So it <is>."),
    "broken off": ("<|channel|>analysis<|message|>Why <|en", "Why <|en", ""),
    "broken off in a header": ("<|channel|>ana", "", ""),
    "nothing": ("", "", ""),
    "parts of tags": ("<|channel|>final<|message|>a <| b <|e<|return|>", "", "a <| b <|e"),
}  # fmt: skip


def read(pieces: list[str]) -> tuple[str, str]:
    """All of the reasoning, and all of the answer."""
    reader = HarmonyReader(["f"])
    found = [*map(reader.push, pieces), reader.finish()]
    return "".join(r for r, _ in found), "".join(a for _, a in found)


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_is_split_the_same_wherever_it_is_cut(name: str) -> None:
    text, *expected = TEXTS[name]
    assert read(list(text)) == tuple(expected)
    for cut in itertools.pairwise([0, *range(len(text) + 1)]):
        pieces = [text[: cut[0]], text[cut[0] : cut[1]], text[cut[1] :]]
        assert read(pieces) == tuple(expected), pieces


def test_reasoning_is_told_as_it_arrives() -> None:
    reader = HarmonyReader([])
    assert reader.push("<|channel|>analysis<|message|>One") == ("One", "")
    assert reader.push(" two<|") == (" two", "")
    assert reader.push("end|><|start|>assistant<|channel|>final<|message|>Three") == ("", "Three")


def test_a_header_that_does_not_end_is_bounded() -> None:
    reader = HarmonyReader([])
    found = [reader.push("<|channel|>" + "a" * 400), reader.push("b" * 400)]
    assert found[0] == ("", "") and found[1] == ("", "<|channel|>" + "a" * 400 + "b" * 400)


def test_the_template_takes_reasoning_as_thinking() -> None:
    call: dict[str, Any] = {"role": "assistant", "reasoning_content": "t", "tool_calls": [{}]}
    assert with_thinking(call)["thinking"] == "t"
    assert "thinking" not in with_thinking(call | {"content": "x"})
    assert "thinking" not in with_thinking({"role": "user", "content": "x"})


TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.thinking %}<|channel|>analysis<|message|>"
    "{{ m.thinking }}<|end|><|start|>assistant{% endif %}<|message|>{{ m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
REGEX = re.escape(f"{THINKING}<|channel|>final<|message|>So.")


@pytest.fixture(scope="module")
def harmony(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A tiny model with a template of harmony."""
    pytest.importorskip("llguidance", reason="answers are forced by a regex")
    folder = tmp_path_factory.mktemp("harmony")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_conftest, "TEMPLATE", TEMPLATE)
        model = engine_conftest.write_tiny(folder / "tiny.gguf", context=2048)
    with serving(model, folder / "log", "--served-model-name", "tiny") as running:
        yield running


def test_routes_tell_reasoning_apart(harmony: Server) -> None:
    assert is_harmony(TEMPLATE) and not is_harmony("<|im_start|>") and not is_harmony(None)
    forced: Any = {"structured_outputs": {"regex": REGEX}}
    asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "a"}]}
    create: Any = harmony.client().chat.completions.create
    message = create(**asked, extra_body=forced).choices[0].message
    assert (message.reasoning_content, message.content) == ("Why?", "So.")
    deltas = [chunk.choices[0].delta for chunk in create(**asked, extra_body=forced, stream=True)]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Why?"
    assert "".join(d.content or "" for d in deltas) == "So."
