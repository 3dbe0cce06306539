"""`pellucid chat`: a conversation in the terminal.

Ctrl-C ends an answer, Ctrl-D ends the program. During an answer Ctrl-C only sets a flag, which is
checked between two tokens; the answer so far stays in the conversation. If a step takes long, a
second Ctrl-C, more than a second after the first, ends the program.

No message is dropped silently: a conversation that no longer fits the model's context is refused
with an error.
"""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RequestError
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from .answer import Timing, explain_answer, load_llm, render_chat
from .messages import is_interactive, read_messages
from .options import (
    ModelOptions,
    SamplingOptions,
    debug_option,
    model_options,
    sampling_options,
    template_options,
)
from .terminal import StreamPrinter, say

if TYPE_CHECKING:
    from ..engine.llm import LLM

__all__ = ["chat"]

_HELP = """\
/clear          begin a new conversation; the system message stays
/system [TEXT]  set the system message; without TEXT: show it
/help           show this
/exit           leave, as Ctrl-D does
\"\"\"             begin and end a message of several lines; Alt-Enter begins a new line too
Ctrl-C          stop the answer; pressed again a second later, while a long step runs: leave"""
_PATIENCE_SECONDS = 1.0


@click.command()
@model_options()
@click.option("--system", metavar="TEXT", help="The system message.")
@template_options
@sampling_options(max_tokens=None, leave_out=("n", "logprobs", "prompt_logprobs"))
@click.option(
    "--stats/--no-stats",
    " /-q",
    default=None,
    help="Show after each answer what it cost (-q: nothing). --stats also tells why it took that "
    "long.",
)
@debug_option
def chat(
    model: ModelOptions,
    system: str | None,
    template: dict[str, Any],
    sampling: SamplingOptions,
    stats: bool | None,
) -> None:
    """Talk with a model. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

    If standard input is not a terminal, each line of it is one message.
    """
    sampling.check()
    llm = load_llm(model, for_chat=True)
    chosen = sampling.choose(llm.generation_config)
    if llm.tokenizer.chat_template is None and "chat_template" not in template:
        raise ConfigError(
            f"{model.name} has no chat template, so it cannot hold a conversation; `pellucid run` "
            "continues a text"
        )
    conversation = _Conversation(llm, chosen.params(), template, system, stats)
    if is_interactive():
        say(f"{model.name}, a context of {llm.max_model_len} tokens, {chosen}")
        click.echo("/help lists the commands, Ctrl-D leaves.", err=True)
    for message in read_messages(_say):
        if not message.startswith("/"):
            conversation.ask(message)
        elif not conversation.command(message):
            return


class _Conversation:
    """The messages so far. A message that could not be answered is removed again."""

    def __init__(
        self,
        llm: "LLM",
        params: SamplingParams,
        template: dict[str, Any],
        system: str | None,
        stats: bool | None,
    ) -> None:
        self._llm = llm
        self._params = params
        self._template = template  # keywords of `render_chat`
        self._system = system
        self._stats = stats
        self._turns: list[dict[str, str]] = []

    def command(self, line: str) -> bool:
        """Run a command, a line that begins with "/". False: end the program."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/clear":
            self._turns.clear()
            _say("a new conversation")
        elif word == "/system":
            if rest.strip():
                self._system = rest.strip()
            _say(
                f"the system message is {self._system!r}"
                if self._system
                else "there is no system message"
            )
        elif word == "/help":
            click.echo(_HELP, err=True)
        else:
            _say(
                f"there is no command {word}; /help lists them, and a message that "
                "begins with / needs a space before it"
            )
        return True

    def ask(self, message: str) -> None:
        """Send one message and write the answer."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        question = {"role": "user", "content": message}
        try:
            output, stopped = self._answer([*system, *self._turns, question])
        # it does not fit the context or the template: drop the message
        except RequestError as error:
            hint = "; /clear begins a new conversation" if self._turns else ""
            _say(f"{error!s}{hint}")
            return
        if output is None:
            _say("stopped before the first token; the message is taken back")
            return
        self._turns += [question, {"role": "assistant", "content": output.outputs[0].text}]
        self._report(output, stopped)

    def _answer(self, messages: list[dict[str, str]]) -> tuple[RequestOutput | None, bool]:
        """(the answer so far, whether Ctrl-C stopped it)."""
        printer = StreamPrinter()
        output: RequestOutput | None = None
        asked = render_chat(self._llm.tokenizer, messages, self._template, self._llm.max_model_len)
        stream = self._llm.stream(asked, self._params)
        try:
            with _ctrl_c() as pressed:
                for step in stream:
                    if step.outputs[0].token_ids:
                        output = step
                        printer.show(output.outputs[0].text)
                    if pressed:
                        break
        finally:
            stream.close()  # ends the request and frees its blocks
            if output is not None:
                printer.end()
        return output, bool(pressed) and not (output is not None and output.finished)

    def _report(self, output: RequestOutput, stopped: bool) -> None:
        answer = output.outputs[0]
        used = len(output.prompt_token_ids) + len(answer.token_ids)
        if answer.finish_reason == "error":
            _say(f"the answer broke off: {answer.stop_reason!s}")
        elif answer.finish_reason == "length" and used >= self._llm.max_model_len:
            _say(
                f"the answer is cut: the context of {self._llm.max_model_len} tokens is full; "
                "/clear begins a new conversation"
            )
        elif answer.finish_reason == "length":
            _say(f"the answer is cut at --max-tokens {len(answer.token_ids)}")
        if self._stats is not False:
            ending = " · stopped" if stopped else ""
            _say(
                f"{Timing.of(output, time.monotonic())} · context {used} of "
                f"{self._llm.max_model_len}{ending}"
            )
        if self._stats:
            _say(explain_answer(output))


@contextmanager
def _ctrl_c() -> Iterator[list[float]]:
    """Within it, Ctrl-C only appends its time to the list that this yields. A second one, more than
    a second later, raises KeyboardInterrupt.
    """
    pressed: list[float] = []

    def note(_: int, __: Any) -> None:
        now = time.monotonic()
        if pressed and now - pressed[0] > _PATIENCE_SECONDS:
            raise KeyboardInterrupt
        pressed.append(now)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _say(sentence: str) -> None:
    say(f"[{sentence}]")
