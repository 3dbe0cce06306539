"""Tool calls in a model's text: found as the text arrives, and forced by a grammar where the client
requires one.

Models write a call as a JSON object with the tool's name and its arguments:

    <tool_call>{"name": "f", "arguments": {…}}</tool_call>   Hermes, Qwen 2.5 and 3
    {"name": "f", "parameters": {…}}                         Llama 3, after <|python_tag|> or not
    [{"name": "f", "arguments": {…}}, …]                     and many others, fenced or not

Small models also leave out the tags that their template asks for. So one reader takes all forms: a
call begins with a tag anywhere, or with `{`, `[` or a code fence at the very beginning, and it is a
call only if it names a tool of the request. Everything else is content.
"""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CallDelta", "ToolCallReader", "tool_grammar"]

_TAGS = ("<tool_call>", "<|python_tag|>", "[TOOL_CALLS]")
# between and around the objects of calls
_GLUE = (*_TAGS, "</tool_call>", "```json", "```", "[", "]", ",", ";", " ", "\n", "\r", "\t")
_FENCES = ("```json",)
_ARGUMENTS = ("arguments", "parameters")


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A part of a call. The first part of each call has its id and name; `arguments` is a piece of
    JSON text.
    """

    index: int
    arguments: str
    id: str | None = None
    name: str | None = None


class _NotACallError(Exception):
    """The text is no JSON object that calls a known tool."""


class _ObjectReader:
    """Reads one `{"name": …, "arguments": {…}}`, character by character."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = names
        self.name: str | None = None
        self.arguments = ""  # the part that was read and not yet returned
        self.has_arguments = False
        self.is_done = False
        self._read: Callable[[str], None] = self._begin
        self._key = ""
        self._value: list[str] = []  # of the key or value that is being read
        self._depth = 0
        self._in_string = self._is_escaped = False

    def push(self, char: str) -> None:
        """Read one character. Raises _NotACallError if it cannot belong to a call."""
        self._read(char)

    def _begin(self, char: str) -> None:
        self._expect(char, "{", self._before_key)

    def _before_key(self, char: str) -> None:
        if char == "}":
            self._end()
        elif char == '"':
            self._value, self._read = [char], self._in_key
        elif char != "," and not char.isspace():
            raise _NotACallError

    def _in_key(self, char: str) -> None:
        if self._string_ends(char):
            self._key, self._read = _decode("".join(self._value)), self._before_colon

    def _before_colon(self, char: str) -> None:
        self._expect(char, ":", self._before_value)

    def _before_value(self, char: str) -> None:
        if char.isspace():
            return
        self._value, self._depth, self._in_string = [], 0, False
        self.has_arguments |= self._key in _ARGUMENTS
        if char == '"':
            self._value, self._read = [char], self._in_string_value
        elif self._key == "name":
            raise _NotACallError
        else:
            self._read = self._in_value
            self._in_value(char)

    def _in_string_value(self, char: str) -> None:
        if not self._string_ends(char):
            return
        text, self._read = _decode("".join(self._value)), self._before_key
        if self._key == "name":
            if text not in self._names:
                raise _NotACallError
            self.name = text
        elif self._key in _ARGUMENTS:  # JSON within a string
            self.arguments += text

    def _in_value(self, char: str) -> None:
        """An object, a list, a number or a word; ends before the "," or "}" that follows it."""
        if self._in_string:
            self._in_string = not self._closes(char)
        elif char == '"':
            self._in_string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]" and self._depth:
            self._depth -= 1
        elif char in ",}" and not self._depth:
            self._read = self._before_key
            self._before_key(char)
            return
        if self._key in _ARGUMENTS and not (char.isspace() and self._depth == 0):
            self.arguments += char

    def _string_ends(self, char: str) -> bool:
        self._value.append(char)
        return self._closes(char)

    def _closes(self, char: str) -> bool:
        """True for the quotation mark that ends a string."""
        if self._is_escaped:
            self._is_escaped = False
        elif char == "\\":
            self._is_escaped = True
        else:
            return char == '"'
        return False

    def _expect(self, char: str, wanted: str, then: Callable[[str], None]) -> None:
        if char == wanted:
            self._read = then
        elif not char.isspace():
            raise _NotACallError

    def _end(self) -> None:
        if self.name is None:
            raise _NotACallError
        self.is_done = True


def _decode(text: str) -> str:
    try:
        decoded: str = json.loads(text, strict=False)
    except ValueError:
        raise _NotACallError from None
    return decoded


class ToolCallReader:
    """Splits a growing answer into content and calls. Give it each new piece of text, then
    `finish`; both return what is new, in order: content (str) and parts of calls.
    """

    def __init__(self, names: Collection[str], new_id: Callable[[], str]) -> None:
        """`names`: the tools of the request. `new_id` gives each call its id."""
        self.num_calls = 0  # that named a tool
        self._names = names
        self._new_id = new_id
        self._held = ""  # not read yet: it may be part of a tag
        self._is_start = True  # nothing but whitespace came before
        self._in_calls = False  # behind a tag, or behind a call
        self._object: _ObjectReader | None = None
        # text since the calls began, or since the last call: content, if no call follows
        self._raw: list[str] = []

    def push(self, text: str) -> list[str | CallDelta]:
        """Take the next piece of the answer."""
        self._held += text
        return _joined(self._read(is_whole=False))

    def finish(self) -> list[str | CallDelta]:
        """Take the end of the answer. A call that has not named its tool is content."""
        found = self._read(is_whole=True)
        if self._in_calls:
            self._leave_calls(found)
        return _joined(found)

    def _read(self, *, is_whole: bool) -> list[str | CallDelta]:
        found: list[str | CallDelta] = []
        is_waiting = False
        while self._held and not is_waiting:
            if self._object is not None:
                self._read_object(self._object, found)
            elif self._in_calls:
                is_waiting = self._read_glue(found, is_whole)
            else:
                is_waiting = self._read_content(found, is_whole)
        return found

    def _read_content(self, found: list[str | CallDelta], is_whole: bool) -> bool:
        """Content up to where calls may begin. True where more text must come first."""
        held = self._held
        # At the very beginning a call needs no tag.
        if self._is_start:
            begin = held.lstrip()
            if not is_whole and any(fence.startswith(begin) for fence in _FENCES):
                return True
            if begin.startswith(("{", "[", *_FENCES)):
                self._in_calls = True
                return False
        # Elsewhere it does.
        stop = min((place for tag in _TAGS if (place := held.find(tag)) >= 0), default=None)
        if stop is None:
            stop = len(held) if is_whole else len(held) - _overlap(held)
        else:
            self._in_calls = True
        if held[:stop].strip():
            self._is_start = False
        found.append(held[:stop])
        self._held = held[stop:]
        return not self._in_calls

    def _read_glue(self, found: list[str | CallDelta], is_whole: bool) -> bool:
        """Skip what stands around calls. True where more text must come first."""
        held = self._held
        if held[0] == "{":
            self._object = _ObjectReader(self._names)
            return False
        if not is_whole and any(len(g) > len(held) and g.startswith(held) for g in _GLUE):
            return True
        glue = next((glue for glue in _GLUE if held.startswith(glue)), None)
        if glue is None:
            self._leave_calls(found)
        else:
            self._raw.append(glue)
            self._held = held[len(glue) :]
        return False

    def _leave_calls(self, found: list[str | CallDelta]) -> None:
        """Content follows. What was read is content too, if no call came of it."""
        raw, self._raw = "".join(self._raw), []
        if self._object is not None or not self.num_calls:
            found.append(raw)
        self._in_calls, self._object, self._is_start = False, None, False

    def _read_object(self, call: _ObjectReader, found: list[str | CallDelta]) -> None:
        """Read on in the object of a call."""
        was_named = call.name is not None
        for i, char in enumerate(self._held):
            self._raw.append(char)
            try:
                call.push(char)
            except _NotACallError:
                self._held = self._held[i + 1 :]
                if call.name is None:
                    self._leave_calls(found)
                else:  # its first part has been told: what follows is content
                    self._raw, self._object, self._in_calls = [], None, False
                return
            if call.is_done:
                break
        self._held = self._held[i + 1 :]
        # Tell what is new of a call whose tool is known.
        if call.name is not None:
            self._raw = []
            if call.is_done and not call.has_arguments:
                call.arguments = "{}"
            if not was_named:
                self.num_calls += 1
                found.append(
                    CallDelta(self.num_calls - 1, call.arguments, self._new_id(), call.name)
                )
            elif call.arguments:
                found.append(CallDelta(self.num_calls - 1, call.arguments))
            call.arguments = ""
        if call.is_done:
            self._object = None


def _joined(found: list[str | CallDelta]) -> list[str | CallDelta]:
    """The same with neighbouring pieces of content as one, and without empty ones."""
    joined: list[str | CallDelta] = []
    for piece in found:
        if isinstance(piece, str) and joined and isinstance(joined[-1], str):
            joined[-1] += piece
        elif piece:
            joined.append(piece)
    return joined


def _overlap(text: str) -> int:
    """How many last characters may be the beginning of a tag."""
    longest = min(len(text), max(map(len, _TAGS)) - 1)
    return next(
        (n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in _TAGS)), 0
    )


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], chat_template: str | None, *, is_parallel: bool
) -> str:
    """A Lark grammar for an answer that is a call of one of `tools`, or several where
    `is_parallel`, written as the model's template writes calls. `tools` are OpenAI's function
    objects: `name`, `parameters` (a JSON Schema).
    """
    template = chat_template or ""
    key = "parameters" if "<|python_tag|>" in template or '"parameters": ' in template else None
    before, after, between = "", "", ";"
    if "<tool_call>" in template:
        before, after, between, key = "<tool_call>\n", "\n</tool_call>", "\n", None
    rules = [
        f"start: call ({json.dumps(between)} call)*" if is_parallel else "start: call",
        "call: " + " | ".join(f"call_{i}" for i in range(len(tools))),
    ]
    for i, tool in enumerate(tools):
        name, schema = json.dumps(tool["name"]), tool.get("parameters") or {"type": "object"}
        head = f'{before}{{"name": {name}, "{key or "arguments"}": '
        rules.append(f"call_{i}: {json.dumps(head)} arguments_{i} {json.dumps('}' + after)}")
        rules.append(f"arguments_{i}: %json {json.dumps(schema)}")
    return "\n".join(rules)
