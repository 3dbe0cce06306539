"""Chat templates: the Jinja programs that come with a model and turn messages into its prompt.

Messages are checked and copied to plain data (`chat_messages.py`). A process with limits renders
them (`template_process.py`). Any failure is an error of the request, in one sentence. The prompt
records which characters the template wrote and which the caller wrote (`traced_text.py`), so that
only the template can write control tokens (`rendered.py`).

A model may have several templates, by name. The choice follows transformers: the one that the
caller names, else "tool_use" if there are tools, else "default". A caller may also pass the text of
a template. Reference: transformers' `apply_chat_template`.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, PellucidError, RequestError, UnsupportedError
from .chat_messages import ChatCopier
from .template_worker import Status
from .traced_text import TracedText

if TYPE_CHECKING:
    from .template_process import TemplateProcesses

__all__ = ["ChatTemplate", "start_rendering"]

MAX_SOURCE = 1 << 18  # characters; the longest template known has 40,000
MAX_TEMPLATES = 64

_PARAMETERS = "messages tools add_generation_prompt continue_final_message chat_template"
_FUNCTIONS = "raise_exception strftime_now range dict namespace cycler joiner"
_RESERVED = frozenset(f"{_PARAMETERS} {_FUNCTIONS}".split())

_log = logging.getLogger(__name__)


@functools.cache
def _shared_processes() -> "TemplateProcesses":
    """The processes of all models. Their module is imported at the first chat, so that a start
    without one does not pay for it.
    """
    from .template_process import TemplateProcesses

    return TemplateProcesses()


def start_rendering() -> None:
    """Start the process that will render the first chat, while other things are done."""
    _shared_processes().start()


class ChatTemplate:
    """The templates of one model; there may be none."""

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str],
        *,
        processes: "TemplateProcesses | None" = None,
    ) -> None:
        """`templates`: the text of the template "default", or several templates by name.
        `special_tokens`: variables that hold the texts of tokens, such as bos_token. `processes`:
        where templates run; None: those that all models share.

        Raises FormatError for a template that is too long, or for too many templates.
        """
        self._templates = {"default": templates} if isinstance(templates, str) else dict(templates)
        if len(self._templates) > MAX_TEMPLATES:
            raise FormatError(
                f"the model has {len(self._templates)} chat templates; it may have at most "
                f"{MAX_TEMPLATES}"
            )
        for source in self._templates.values():
            _check_source(source, FormatError)
        self._special_tokens = dict(special_tokens)
        self._processes = processes
        self._told: set[str] = set()

    @property
    def source(self) -> str | None:
        """The text of the default template; None if there is none."""
        return self._templates.get("default")

    @property
    def sources(self) -> Mapping[str, str]:
        """The texts of all templates, by name."""
        return MappingProxyType(self._templates)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The texts of tokens that templates may use, by names such as bos_token."""
        return MappingProxyType(self._special_tokens)

    @property
    def names(self) -> list[str]:
        """The names that the argument `chat_template` may have."""
        return sorted(self._templates)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> TracedText:
        """The prompt. Every text from a message, a tool or a variable is marked as the caller's.

        `chat_template`: the name of one of the model's templates, or the text of another.
        `chat_template_kwargs`: more variables for the template, such as enable_thinking.
        `continue_final_message`: the prompt ends where the text of the last message ends.

        Raises RequestError for malformed messages, for messages that the template refuses or that
        exceed its limits, and for a `chat_template` that is not a template. Raises FormatError or
        UnsupportedError if the model's own template is invalid or uses unknown features, and
        CapacityError if no process can be started.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt are both true; a prompt either "
                "continues the last message or begins another"
            )
        # check and copy what the caller gave
        copier = ChatCopier()
        plain = copier.messages(messages)
        plain_tools = copier.tools(tools)
        reserved = _RESERVED | self._special_tokens.keys()
        variables = copier.variables(chat_template_kwargs, reserved)
        # choose the template, and render it
        source = self._choose(chat_template, has_tools=plain_tools is not None)
        self._tell_unread(variables, source)
        job = {
            "source": source,
            "own": {**self._special_tokens, "add_generation_prompt": add_generation_prompt},
            "messages": plain,
            "tools": plain_tools,
            "variables": variables,
            "continue_final": continue_final_message,
        }
        answer = (self._processes or _shared_processes()).ask(job)
        if answer.status is not Status.RENDERED:
            is_callers = source not in self._templates.values()
            raise _error(answer.status, answer.text, is_callers=is_callers)
        return TracedText(answer.text, answer.marks)

    def _choose(self, chosen: str | None, *, has_tools: bool) -> str:
        """The text of the template for a request."""
        # none was asked for
        if chosen is None:
            name = "tool_use" if has_tools and "tool_use" in self._templates else "default"
            if name in self._templates:
                return self._templates[name]
            if not self._templates:
                raise RequestError(
                    "the model has no chat template; it continues text, and cannot be given "
                    "messages without a chat_template"
                )
            raise RequestError(
                "the model has no default chat template; chat_template must name one of "
                f"{', '.join(map(repr, self.names))}"
            )
        if not isinstance(chosen, str):
            raise RequestError(
                f"chat_template is of type {type(chosen).__name__}; it must be a string"
            )
        # one of the model's, by name
        if chosen in self._templates:
            return self._templates[chosen]
        # the text of a template
        if "{{" not in chosen and "{%" not in chosen:
            names = ", ".join(map(repr, self.names)) or "none"
            raise RequestError(
                f"chat_template is {chosen[:80]!r}, which is neither the text of a template nor "
                f"the name of one that the model has ({names})"
            )
        _check_source(chosen, RequestError)
        return chosen

    def _tell_unread(self, variables: Mapping[str, Any], source: str) -> None:
        """Log that the template does not read a variable, once for each name."""
        for name in variables.keys() - self._told if len(self._told) < MAX_TEMPLATES else ():
            if name not in source:
                self._told.add(name)
                _log.warning("the chat template does not read chat_template_kwargs[%r]", name)


def _check_source(source: str, kind: type[FormatError | RequestError]) -> None:
    if len(source) > MAX_SOURCE:
        raise kind(
            f"the chat template has {len(source)} characters; it must have at most {MAX_SOURCE}"
        )


def _error(status: Status, text: str, *, is_callers: bool) -> PellucidError:
    """The error for an answer that is no prompt, without control characters for a terminal."""
    text = "".join(char if char.isprintable() else " " for char in text[:1000])
    template = "the chat_template given" if is_callers else "the model's chat template"
    match status:
        case Status.NOT_BUILT:
            kind: type[PellucidError] = RequestError if is_callers else UnsupportedError
            return kind(f"{template} asks for what is not built: {text}")
        case Status.NOT_A_TEMPLATE:
            kind = RequestError if is_callers else FormatError
            return kind(f"{template} is not valid: {text}")
        case Status.WRONG_MESSAGES:
            return RequestError(text)
        case Status.REFUSED:
            return RequestError(f"{template} refuses the messages: {text}")
        case Status.LIMITED:
            return RequestError(f"{template} was stopped: {text}")
    return RequestError(f"{template} fails on these messages: {text}")
