"""Which form of messages a chat template reads, and how messages are converted to it.

Clients write the same message in several forms, and a template usually reads one of them. So four
things are looked up in its syntax tree, and the messages are converted to match:

- content: a text, or a list of parts where the template has a loop over parts (vLLM's rule);
- no content beside tool calls: null if the template tests for null, else an empty text;
- the arguments of a tool call: a mapping, or JSON if the template writes them out unchanged;
- the model's reasoning: under that name of `REASONING` that the template reads.

Variables are followed through `set`, attributes of namespaces and parameters of macros; scopes are
ignored. Reference: vLLM's `chat_template_content_format="auto"` and its decoding of arguments,
llama.cpp's `requires_object_arguments`, transformers' guide to tool use.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jinja2 import nodes

from ..errors import RequestError
from .chat_messages import MAX_DEPTH, REASONING
from .traced_text import CONTINUED, whole

__all__ = ["Reading", "adapt_messages", "find_reading", "may_be_null"]

_TEXT_AND_PARTS = frozenset(("text", "type"))  # the fields that a loop over parts reads
_OBJECT_FILTERS = frozenset(("items", "dictsort"))
_OBJECT_METHODS = frozenset(("items", "keys", "values", "get"))
_LIST_FILTERS = frozenset(("map", "reject", "rejectattr", "select", "selectattr"))


@dataclass(frozen=True)
class Reading:
    """The form of messages that a template expects."""

    loops_over_parts: bool  # of a content
    takes_text: bool  # as a content: it has no loop over parts, or tests for a string
    asks_for_null: bool  # it tests whether a content is null
    writes_arguments: bool  # of a tool call, unchanged
    takes_both: bool  # arguments as JSON and as a mapping: it tests which they are
    reasoning: tuple[str, ...]  # those names of REASONING that it reads


# ---- the syntax tree


def find_reading(tree: nodes.Template) -> Reading:
    """How the template with the syntax tree `tree` reads its messages."""
    # content
    content, arguments = _Field(tree, "content"), _Field(tree, "arguments")
    asked = {test.name for test in tree.find_all(nodes.Test) if content.is_read_by(test.node)}
    loops = any(_loops_over_parts(content, loop) for loop in tree.find_all(nodes.For)) or any(
        filtered.name in _LIST_FILTERS and content.is_read_by(filtered.node)
        for filtered in tree.find_all(nodes.Filter)
    )
    asks_for_null = "none" in asked or any(
        content.is_read_by(comparison.expr)
        and any(_constant(operand.expr) == (None,) for operand in comparison.ops)
        for comparison in tree.find_all(nodes.Compare)
    )
    # arguments of tool calls
    of_arguments = {t.name for t in tree.find_all(nodes.Test) if arguments.is_read_by(t.node)}
    writes = "string" in of_arguments or (
        any(map(arguments.is_read_by, _written(tree))) and not _is_encoded(tree, arguments)
    )
    # reasoning
    names = {read for node in tree.find_all((nodes.Getattr, nodes.Const)) for read in _names(node)}
    return Reading(
        loops_over_parts=loops,
        takes_text=not loops or "string" in asked,
        asks_for_null=asks_for_null,
        writes_arguments=writes and not _takes_apart(tree, arguments),
        takes_both=bool(of_arguments & {"string", "mapping"}),
        reasoning=tuple(name for name in REASONING if name in names),
    )


class _Field:
    """The expressions of a template that stand for a field of a message."""

    def __init__(self, tree: nodes.Template, name: str) -> None:
        """Names are followed from assignment to assignment until no new one is found."""
        self._attributes, self._variables = {name}, set[str]()
        macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
        known = -1
        while known < (known := len(self._attributes) + len(self._variables)):
            for assigned in tree.find_all(nodes.Assign):
                if self.is_read_by(assigned.node):
                    self._follow(assigned.target)
            for call in tree.find_all(nodes.Call):
                if isinstance(call.node, nodes.Name) and call.node.name in macros:
                    self._follow_call(call, macros[call.node.name])

    def is_read_by(self, node: nodes.Node | None) -> bool:
        """Whether `node` is this field, or this field with a default, trimmed or cut."""
        if isinstance(node, nodes.Filter):
            return node.name not in ("length", "count", "tojson") and self.is_read_by(node.node)
        if isinstance(node, nodes.Or):
            return self.is_read_by(node.left)
        if isinstance(node, nodes.CondExpr):
            return self.is_read_by(node.expr1) or self.is_read_by(node.expr2)
        if isinstance(node, nodes.Getattr):
            return node.attr in self._attributes
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Slice):
                return self.is_read_by(node.node)
            return any(key in self._attributes for key in _constant(node.arg))
        if isinstance(node, nodes.Call):  # message.get("content")
            return (
                isinstance(node.node, nodes.Getattr)
                and node.node.attr == "get"
                and any(key in self._attributes for arg in node.args[:1] for key in _constant(arg))
            )
        return isinstance(node, nodes.Name) and node.name in self._variables

    def _follow(self, target: nodes.Node) -> None:
        if isinstance(target, nodes.Name):
            self._variables.add(target.name)
        elif isinstance(target, nodes.NSRef):
            self._attributes.add(target.attr)

    def _follow_call(self, call: nodes.Call, macro: nodes.Macro) -> None:
        for parameter, argument in zip(macro.args, call.args, strict=False):
            if self.is_read_by(argument):
                self._variables.add(parameter.name)
        self._variables |= {
            argument.key for argument in call.kwargs if self.is_read_by(argument.value)
        }


def _loops_over_parts(content: _Field, loop: nodes.For) -> bool:
    """Whether `loop` runs over the parts of a content, not over the characters of a text."""
    return content.is_read_by(loop.iter) and any(
        name in _TEXT_AND_PARTS
        for node in loop.find_all((nodes.Getattr, nodes.Const))
        for name in _names(node)
    )


def _takes_apart(tree: nodes.Template, arguments: _Field) -> bool:
    """Whether the template loops over the arguments of a call, or looks one up."""
    return (
        any(arguments.is_read_by(loop.iter) for loop in tree.find_all(nodes.For))
        or any(
            filtered.name in _OBJECT_FILTERS and arguments.is_read_by(filtered.node)
            for filtered in tree.find_all(nodes.Filter)
        )
        or any(
            read.attr in _OBJECT_METHODS and arguments.is_read_by(read.node)
            for read in tree.find_all(nodes.Getattr)
        )
        or any(
            not isinstance(read.arg, nodes.Slice) and arguments.is_read_by(read.node)
            for read in tree.find_all(nodes.Getitem)
        )
    )


def _is_encoded(tree: nodes.Template, arguments: _Field) -> bool:
    """Whether the template makes JSON of the arguments."""
    return any(
        filtered.name == "tojson" and arguments.is_read_by(filtered.node)
        for filtered in tree.find_all(nodes.Filter)
    )


def _written(tree: nodes.Template) -> Iterator[nodes.Node]:
    """The expressions that are written out or joined to a text."""
    for output in tree.find_all(nodes.Output):
        yield from output.nodes
    for concatenated in tree.find_all(nodes.Concat):
        yield from concatenated.nodes
    for added in tree.find_all(nodes.Add):
        yield from (added.left, added.right)


def _constant(node: nodes.Node) -> tuple[Any, ...]:
    """(the value,) of a constant that can be a key, or nothing."""
    return (node.value,) if isinstance(node, nodes.Const) else ()


def _names(node: nodes.Node) -> Iterator[str]:
    if isinstance(node, nodes.Getattr):
        yield node.attr
    elif isinstance(node, nodes.Const) and isinstance(node.value, str):
        yield node.value


# ---- messages


def adapt_messages(
    messages: list[dict[str, Any]],
    reading: Reading,
    *,
    with_null: bool = False,
    continue_final: bool = False,
) -> None:
    """Convert messages of `ChatCopier` to the form that the template reads, in place.

    `with_null`: missing content beside tool calls becomes null, not an empty text.
    `continue_final`: the texts of the last message get the mark CONTINUED. Raises RequestError if
    the template needs a mapping and the arguments are not JSON.
    """
    # fields of each message
    for i, message in enumerate(messages):
        reasoning = [message[name] for name in REASONING if message.get(name)]
        for name in reading.reasoning if reasoning else ():
            message[name] = message.get(name) or reasoning[0]
        calls = message.get("tool_calls")
        for j, call in enumerate(calls if isinstance(calls, list) else ()):
            _adapt_call(call, reading, f"messages[{i}].tool_calls[{j}]")
        if with_null and may_be_null(message):
            message["content"] = None
        else:
            message["content"] = _content(message.get("content"), reading)
    # the text to continue
    if continue_final:
        content = messages[-1]["content"]
        if isinstance(content, str):
            messages[-1]["content"] = whole(content, CONTINUED)
        for part in content if isinstance(content, list) else ():
            part["text"] = whole(part["text"], CONTINUED)


def may_be_null(message: Mapping[str, Any]) -> bool:
    """Whether the message has tool calls and no content."""
    return not message.get("content") and bool(message.get("tool_calls"))


def _content(content: Any, reading: Reading) -> str | list[dict[str, Any]]:
    """The content as a text or as a list of parts, whichever the template reads."""
    if isinstance(content, list):
        return content if reading.loops_over_parts else "\n".join(part["text"] for part in content)
    text: str = content or ""
    return text if reading.takes_text else [{"type": "text", "text": text}]


def _adapt_call(call: Any, reading: Reading, where: str) -> None:
    """Convert the arguments, which stand in call["function"] or in the call itself."""
    holders = [call, call.get("function")] if isinstance(call, dict) else []
    for holder in holders:
        if not isinstance(holder, dict):
            continue
        given = holder.get("arguments")
        if isinstance(given, str) and not reading.writes_arguments:
            holder["arguments"] = _decoded(given, f"{where}.function.arguments")
        elif isinstance(given, dict) and reading.writes_arguments and not reading.takes_both:
            holder["arguments"] = json.dumps(given, ensure_ascii=False)


def _decoded(text: str, where: str) -> Any:
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"{where} is not JSON, and the chat template reads it as a mapping: {error}"
        ) from None
    if _depth(value) > MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep")
    return value


def _depth(value: Any) -> int:
    """Levels of lists and mappings."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, parts), default=0) if isinstance(value, dict | list) else 0
