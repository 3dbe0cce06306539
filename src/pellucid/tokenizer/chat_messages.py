"""The messages, tools and variables of a caller, checked and copied to plain data before a template
sees them.

A message is {"role": str, "content": str}. Content may be a list of {"type": "text", "text": str}.
It may be absent or null beside tool calls or reasoning. Other fields (name, tool_calls,
tool_call_id) are copied as they are. Everything in a chat is bounded in number, length and depth.
Reference: OpenAI's chat completions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RequestError

__all__ = ["REASONING", "ChatCopier"]

MAX_MESSAGES = 1 << 15
MAX_TOOLS = 1 << 10
MAX_VARIABLES = 64
MAX_VALUES = 1 << 18  # texts, numbers, lists, mappings and keys of one chat together
MAX_CHARACTERS = 1 << 23  # of all texts of one chat together
MAX_DEPTH = 32
MAX_INT_BITS = 1024

REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one field


class ChatCopier:
    """Copies the parts of one chat; its limits hold for all of them together."""

    def __init__(self) -> None:
        self._values = 0
        self._characters = 0

    def messages(self, messages: object) -> list[dict[str, Any]]:
        """The messages as plain data. A content is a text, a list of text parts, or None. Raises
        RequestError, which names the place and the problem.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
            raise RequestError(
                "messages must be a list of at least one message, as {'role': 'user', 'content': "
                "'Hello'}"
            )
        _check_length(messages, "messages", MAX_MESSAGES)
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def tools(self, tools: object) -> list[Any] | None:
        """The tools as plain data; None if there are none."""
        if tools is None:
            return None
        if not isinstance(tools, Sequence) or isinstance(tools, str | bytes):
            raise RequestError(f"tools is of type {type(tools).__name__}; it must be a list")
        _check_length(tools, "tools", MAX_TOOLS)
        for i, tool in enumerate(tools):
            if not isinstance(tool, Mapping):
                raise RequestError(
                    f"tools[{i}] is of type {type(tool).__name__}; it must be a mapping"
                )
        return self._plain(tools, "tools") or None

    def variables(self, variables: object, reserved: frozenset[str]) -> dict[str, Any]:
        """Variables for the template as plain data. Names in `reserved` are refused."""
        if variables is None:
            return {}
        if not isinstance(variables, Mapping):
            raise RequestError(
                f"chat_template_kwargs is of type {type(variables).__name__}; it must be a mapping"
            )
        _check_length(variables, "chat_template_kwargs", MAX_VARIABLES)
        for name in variables:
            if not isinstance(name, str) or not name.isidentifier():
                raise RequestError(
                    f"chat_template_kwargs has the name {str(name)[:40]!r}; names must be those "
                    "of variables, as 'enable_thinking'"
                )
            if name in reserved:
                raise RequestError(
                    f"chat_template_kwargs must not set {name!r}, which is given to the template "
                    "in another way"
                )
        plain: dict[str, Any] = self._plain(variables, "chat_template_kwargs")
        return plain

    def _message(self, message: object, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            raise RequestError(
                f"{where} is of type {type(message).__name__}; it must be a mapping with 'role' "
                "and 'content'"
            )
        plain: dict[str, Any] = self._plain(message, where)
        # the role
        role, content, calls = (plain.get(name) for name in ("role", "content", "tool_calls"))
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"{where}.role must be a string that is not empty, as 'system', 'user' or "
                "'assistant'"
            )
        # the content
        if isinstance(content, list):
            plain["content"] = [
                _text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)
            ]
        elif content is None:
            if not calls and not any(plain.get(name) for name in REASONING):
                raise RequestError(f"{where}.content must be a string or a list of text parts")
        elif not isinstance(content, str):
            raise RequestError(f"{where}.content must be a string or a list of text parts")
        # the reasoning
        for name in REASONING:
            if not isinstance(plain.get(name), str | None):
                raise RequestError(f"{where}.{name} must be a string")
        return plain

    def _plain(self, value: Any, where: str, depth: int = 0) -> Any:
        """A copy in JSON's own types, so that a template cannot reach methods of other classes."""
        # limits of the whole chat
        if depth > MAX_DEPTH:
            raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep")
        self._values += 1
        if self._values > MAX_VALUES:
            raise RequestError(
                f"{where} is one value too many; messages, tools and variables may hold "
                f"{MAX_VALUES} values together"
            )
        # single values
        if isinstance(value, str):
            return self._text(value, where)
        if value is None or type(value) in (bool, float):
            return value
        if type(value) is int:
            if value.bit_length() > MAX_INT_BITS:
                raise RequestError(f"{where} is a number of more than {MAX_INT_BITS} bits")
            return value
        # mappings and lists
        if isinstance(value, Mapping):
            return {
                self._text(str(key), where): self._plain(
                    item, f"{where}.{str(key)[:40]}", depth + 1
                )
                for key, item in value.items()
            }
        if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
            return [self._plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        raise RequestError(
            f"{where} is of type {type(value).__name__}; it must be text, a number, true, false, "
            "null, a list or a mapping"
        )

    def _text(self, text: str, where: str) -> str:
        self._characters += len(text)
        if self._characters > MAX_CHARACTERS:
            raise RequestError(
                f"{where} is too long; messages, tools and variables may hold {MAX_CHARACTERS} "
                "characters together"
            )
        return str.__str__(text)  # the plain text of a subclass, such as a str enum


def _check_length(values: Sequence[Any] | Mapping[Any, Any], name: str, limit: int) -> None:
    if len(values) > limit:
        raise RequestError(f"{name} has {len(values)} entries; it may have at most {limit}")


def _text_part(part: Any, where: str) -> dict[str, str]:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestError(
            f"{where} is a part of type {str(kind)[:40]!r}; only parts of type 'text' are supported"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text must be a string")
    return {"type": "text", "text": text}
