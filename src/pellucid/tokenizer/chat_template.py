"""Chat templates: the Jinja program that came with a model and turns messages into its prompt.

One idea: whatever goes wrong is the request's error, with one sentence. Messages are checked and
copied to plain data before the template sees them; the template runs in a sandbox with an allowance
(`template_sandbox.py`). The prompt tells what the template wrote from what the caller wrote
(`traced_text.py`), so that control tokens can be the template's alone (`rendered.py`).

A message is {"role": str, "content": str}. Content may be a list of {"type": "text", "text": str},
which becomes one text with a newline between the parts, and may be absent where the message has
tool calls. Other fields (name, tool_calls, reasoning_content) go to the template as they are.
Reference: transformers' chat templates. Jinja is imported when the first chat is rendered.
"""

import functools
from collections.abc import Mapping, Sequence
from types import CodeType
from typing import Any

from ..errors import FormatError, RequestError, UnsupportedError
from .traced_text import TracedText, foreign

__all__ = ["ChatTemplate", "check_messages"]

MAX_SOURCE = 1 << 18  # characters; the longest template known has 40,000
MAX_DEPTH = 32  # of data inside messages and tools


class ChatTemplate:
    """A model's template, compiled when it is first used."""

    def __init__(
        self, source: str, special_tokens: Mapping[str, str], *, for_tools: str | None = None
    ) -> None:
        """`special_tokens`: the variables that name tokens, as bos_token. `for_tools`: another
        template for prompts with tools.
        """
        for text in (source, for_tools or ""):
            if len(text) > MAX_SOURCE:
                raise FormatError(
                    f"the chat template has {len(text)} characters; it must have at most "
                    f"{MAX_SOURCE}"
                )
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._for_tools = for_tools

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_vars: Any,
    ) -> TracedText:
        """The prompt, in which every text of a message, a tool or a variable is marked as the
        caller's.

        Raises RequestError for messages that are malformed or that the template refuses.
        """
        from .template_sandbox import LimitError, RefusedError, render_template

        variables = {
            **self._special_tokens,
            **{name: foreign(_plain(value, name)) for name, value in template_vars.items()},
            "messages": foreign(check_messages(messages)),
            "tools": foreign(_plain(list(tools), "tools")) if tools else None,
            "add_generation_prompt": add_generation_prompt,
        }
        code = self._code_for_tools if tools and self._for_tools is not None else self._code
        try:
            text = render_template(code, variables)
        except RefusedError as error:
            raise RequestError(f"the model's chat template refuses the messages: {error}") from None
        except LimitError as error:
            raise RequestError(f"the model's chat template was stopped: {error}") from None
        except Exception as error:  # a template can fail as any program can
            raise RequestError(
                f"the model's chat template fails on these messages: {type(error).__name__}: "
                f"{str(error)[:500]}"
            ) from error
        return text if isinstance(text, TracedText) else TracedText(text, bytes(len(text)))

    @functools.cached_property
    def _code(self) -> CodeType:
        return _compiled(self.source)

    @functools.cached_property
    def _code_for_tools(self) -> CodeType:
        return _compiled(self._for_tools or "")


def _compiled(source: str) -> CodeType:
    from jinja2 import TemplateAssertionError

    from .template_sandbox import compile_template

    try:
        return compile_template(source)
    except TemplateAssertionError as error:  # sound, but there is no such filter or test
        raise UnsupportedError(
            f"the model's chat template asks for what is not built: {error.message}"
        ) from None
    except Exception as error:
        raise FormatError(
            f"the model's chat template is not valid: {type(error).__name__}: {str(error)[:500]}"
        ) from error


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages as plain data, every content a string. RequestError names the place and what is
    wrong.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes) or not messages:
        raise RequestError(
            "messages must be a list of at least one message, as {'role': 'user', 'content': "
            "'Hello'}"
        )
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(
            f"{where} is of type {type(message).__name__}; it must be a mapping with 'role' and "
            "'content'"
        )
    plain: dict[str, Any] = _plain(message, where)
    role, content = plain.get("role"), plain.get("content")
    if not isinstance(role, str) or not role:
        raise RequestError(
            f"{where}.role must be a string that is not empty, as 'system', 'user' or 'assistant'"
        )
    if isinstance(content, list):
        plain["content"] = "\n".join(
            _text_part(part, f"{where}.content[{i}]") for i, part in enumerate(content)
        )
    elif content is None and plain.get("tool_calls"):
        plain["content"] = ""
    elif not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of text parts")
    return plain


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        kind = part.get("type") if isinstance(part, dict) else part
        raise RequestError(
            f"{where} is a part of type {str(kind)[:40]!r}; only parts of type 'text' are supported"
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text must be a string")
    return text


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy in JSON's own types, so that a template cannot reach a method of anything else."""
    if depth > MAX_DEPTH:
        raise RequestError(f"{where} is nested more than {MAX_DEPTH} deep")
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # an enum's text, say
    if isinstance(value, Mapping):
        return {
            str(key): _plain(item, f"{where}.{str(key)[:40]}", depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
    raise RequestError(
        f"{where} is of type {type(value).__name__}; it must be text, a number, true, false, "
        "null, a list or a mapping"
    )
