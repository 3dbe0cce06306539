"""Tool calls are found in an answer however it is cut into pieces; the grammar forces them."""

import itertools
import json
import random
from typing import Any

import pytest

from pellucid.server.tool_calls import CallDelta, ToolCallReader, tool_grammar

NAMES = ("weather", "get_time")


def read(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The content, and the calls as (name, arguments)."""
    ids = itertools.count()
    reader = ToolCallReader(NAMES, lambda: f"call_{next(ids)}")
    content = ""
    calls: list[tuple[str, str]] = []
    for piece in [*itertools.chain.from_iterable(map(reader.push, pieces)), *reader.finish()]:
        if isinstance(piece, str):
            content += piece
        elif piece.name is not None:
            assert piece.index == len(calls) and piece.id == f"call_{piece.index}"
            calls.append((piece.name, piece.arguments))
        else:
            assert piece.index == len(calls) - 1 and piece.id is None
            calls[-1] = (calls[-1][0], calls[-1][1] + piece.arguments)
    assert reader.num_calls == len(calls)
    return content, calls


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "São \\"Paulo\\""}}\n</tool_call>'
ARGUMENTS = '{"city": "São \\"Paulo\\""}'
CALL = ("weather", ARGUMENTS)
TIME = '{"name": "get_time", "arguments": {}}'

ANSWERS: dict[str, tuple[str, str, list[tuple[str, str]]]] = {
    "content": ("Hello, <b>world</b> [1] {x}", "Hello, <b>world</b> [1] {x}", []),
    "spaces": ("  \n ", "  \n ", []),
    "hermes": (HERMES, "", [CALL]),
    "hermes after content": ("Let me see.\n" + HERMES, "Let me see.\n", [CALL]),
    "two": (HERMES + "\n<tool_call>\n" + TIME + "\n</tool_call>", "", [CALL, ("get_time", "{}")]),
    "content after": (HERMES + "\nDone.", "Done.", [CALL]),
    "not closed": (HERMES.removesuffix("\n</tool_call>"), "", [CALL]),
    "bare": (f'{{"name": "weather", "arguments": {ARGUMENTS}}}', "", [CALL]),
    "llama 3": (f'{{"name": "weather", "parameters": {ARGUMENTS}}}', "", [CALL]),
    "llama 3 tag": (f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}', "", [CALL]),
    "llama 3, two": (f'{{"name": "weather", "parameters": {ARGUMENTS}}}; {TIME}', "",
                     [CALL, ("get_time", "{}")]),
    "mistral": (f'[TOOL_CALLS][{{"name": "weather", "arguments": {ARGUMENTS}}}, {TIME}]', "",
                [CALL, ("get_time", "{}")]),
    "fenced": (f'```json\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n```', "", [CALL]),
    "arguments first": (f'{{"arguments": {ARGUMENTS}, "name": "weather"}}', "", [CALL]),
    "as a string": (f'{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}', "", [CALL]),
    "other keys": (f'{{"id": 3, "type": "function", "name": "weather", "arguments": {ARGUMENTS}, '
                   '"x": [1, {"name": "no"}]}', "", [CALL]),
    "no arguments": ('<tool_call>{"name": "get_time"}</tool_call>', "", [("get_time", "{}")]),
    "nested": ('{"name": "weather", "arguments": {"a": {"b": [1, "}"]}, "c": null}}', "",
               [("weather", '{"a": {"b": [1, "}"]}, "c": null}')]),
    "unknown tool": ('{"name": "rm", "arguments": {}}', '{"name": "rm", "arguments": {}}', []),
    "json that is no call": ('{"a": 1, "b": [2]}', '{"a": 1, "b": [2]}', []),
    "a list": ("[1, 2, 3]", "[1, 2, 3]", []),
    "a link": ("[text](url) and more", "[text](url) and more", []),
    "a fence": ("```json\n[1]\n```", "```json\n[1]\n```", []),
    "broken off in the name": ('{"name": "wea', '{"name": "wea', []),
    "broken off": ('{"name": "weather", "arguments": {"ci', "", [("weather", '{"ci')]),
    "tag without a call": ("<tool_call>none", "<tool_call>none", []),
    "json in content": (f"I would say {TIME}", f"I would say {TIME}", []),
    "part of a tag": ("a <tool_", "a <tool_", []),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_are_found_however_the_text_is_cut(name: str) -> None:
    text, content, calls = ANSWERS[name]
    rng = random.Random(0)
    cuts = [[text], list(text)]
    for _ in range(30):
        places = sorted(rng.sample(range(len(text) + 1), min(len(text), rng.randint(0, 6))))
        cuts.append([text[a:b] for a, b in itertools.pairwise([0, *places, len(text)])])
    for pieces in cuts:
        assert read(pieces) == (content, calls), pieces


def test_arguments_are_told_as_they_arrive() -> None:
    reader = ToolCallReader(NAMES, lambda: "call_x")
    assert reader.push('<tool_call>{"name": "weather", "argu') == [
        CallDelta(0, "", "call_x", "weather")
    ]
    assert reader.push('ments": {"city": "Par') == [CallDelta(0, '{"city": "Par')]
    assert reader.push('is"}') == [CallDelta(0, 'is"}')]
    assert reader.push("}\n</tool_call>") == []
    assert reader.finish() == []


def test_no_text_is_lost_or_read_twice() -> None:
    """Random texts over the pieces that matter: without a call the content is the text."""
    rng = random.Random(1)
    parts = ["<tool_call>", "</tool_call>", "{", "}", "[", "]", '"name"', ":", '"rm"', "```json",
             "a", " ", "\n", "\\", '"', ",", ";", "<|python_tag|>", "<", "`"]  # fmt: skip
    for _ in range(2000):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(0, 12)))
        whole, letters = read([text]), read(list(text))
        assert whole == letters
        assert whole == (text, [])


TOOLS: list[dict[str, Any]] = [
    {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"$ref": "#/$defs/city"}},
            "required": ["city"],
            "additionalProperties": False,
            "$defs": {"city": {"enum": ["Paris", "São Paulo"]}},
        },
    },
    {"name": "get_time", "parameters": {"type": "object", "properties": {}, "required": [],
                                        "additionalProperties": False}},
]  # fmt: skip


@pytest.mark.parametrize("template", ["… <tool_call> …", "… <|python_tag|> …", None])
@pytest.mark.parametrize("is_parallel", [False, True])
def test_the_grammar_takes_calls_and_nothing_else(template: str | None, is_parallel: bool) -> None:
    llguidance = pytest.importorskip("llguidance")
    vocabulary = llguidance.LLTokenizer("byte")
    grammar = tool_grammar(TOOLS, template, is_parallel=is_parallel)

    def is_taken(text: str) -> bool:
        matcher = llguidance.LLMatcher(vocabulary, llguidance.LLMatcher.grammar_from_lark(grammar))
        assert not matcher.get_error()
        ids = vocabulary.tokenize_str(text)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())

    is_hermes = template is not None and "<tool_call>" in template
    key = "parameters" if template is not None and not is_hermes else "arguments"
    call = f'{{"name": "weather", "{key}": {{"city": "Paris"}}}}'
    other = f'{{"name": "get_time", "{key}": {{}}}}'
    if is_hermes:
        call, other = (f"<tool_call>\n{c}\n</tool_call>" for c in (call, other))
    both = call + ("\n" if is_hermes else ";") + other
    assert is_taken(call) and is_taken(other) and is_taken(both) == is_parallel
    assert not is_taken(call.replace("Paris", "Rome")) and not is_taken("Hello")
    assert read([both])[1] == [("weather", '{"city": "Paris"}'), ("get_time", "{}")]
