"""`pellucid run`: one prompt, one answer, written as it is generated.

One idea: standard output holds the answer and nothing else, so it can be piped; what it cost goes
to standard error. With `--json`, standard output holds one JSON object instead.
"""

import json
import sys
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RequestError
from ..request import RequestOutput
from .answer import Timing, load_llm
from .options import (
    ModelOptions,
    debug_option,
    json_option,
    model_options,
    sampling_options,
    sampling_params,
)
from .terminal import StreamPrinter, one_line

if TYPE_CHECKING:
    from ..engine.llm import LLM

__all__ = ["read_prompt", "run"]


@click.command()
@click.argument("prompt", required=False)
@model_options
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option(
    "--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template."
)
@sampling_options(max_tokens=512)
@json_option
@click.option("-q", "--quiet", is_flag=True, help="No figures on standard error.")
@debug_option
def run(
    prompt: str | None,
    model: ModelOptions,
    system: str | None,
    raw: bool,
    as_json: bool,
    quiet: bool,
    **sampling: Any,
) -> None:
    """Answer PROMPT and stop. PROMPT is read from standard input where it is "-", or missing while
    something is piped in.

    A model that has a chat template is asked through it; one that has none continues the text.
    """
    params = sampling_params(sampling)
    text = read_prompt(prompt)
    if raw and system is not None:
        raise click.UsageError(
            "--system is a message of the chat template, which --raw leaves out: give one of the "
            "two"
        )
    llm = load_llm(model)
    if raw or llm.tokenizer.chat_template is None:
        if system is not None:
            raise ConfigError(f"{model.name} has no chat template, so it cannot take --system")
        stream = llm.stream(text, params)
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        stream = llm.chat_stream([*messages, {"role": "user", "content": text}], params)
    printer = None if as_json else StreamPrinter()
    for output in stream:
        if printer is not None:
            printer.show(output.outputs[0].text)
    if printer is not None:
        printer.end()
    timing = Timing.of(output, time.monotonic())
    if as_json:
        click.echo(json.dumps(_report(llm, output, timing), ensure_ascii=False))
    elif not quiet:
        click.echo(f"[{timing} · {_ending(output, llm.max_model_len)}]", err=True)
    if output.outputs[0].finish_reason == "error":
        raise RequestError(f"the answer broke off: {output.outputs[0].stop_reason}")


def read_prompt(prompt: str | None) -> str:
    """The prompt of the command line or of standard input, as text that can be written as UTF-8."""
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError(
            'give a PROMPT, or pipe one in ("-"); for a conversation there is `pellucid chat`'
        )
    try:
        text = prompt if prompt is not None and prompt != "-" else sys.stdin.buffer.read().decode()
        text.encode()  # bytes of the command line that were not UTF-8 fail here
    except UnicodeError:
        raise click.UsageError("the prompt is not UTF-8 text") from None
    if not text:
        raise click.UsageError("the prompt is empty")
    return text


def _ending(output: RequestOutput, max_model_len: int) -> str:
    """Why the answer is over."""
    answer = output.outputs[0]
    if answer.finish_reason != "length":
        return (
            f"stopped at {one_line(repr(answer.stop_reason))}"
            if isinstance(answer.stop_reason, str)
            else "complete"
        )
    if len(output.prompt_token_ids) + len(answer.token_ids) >= max_model_len:
        return f"cut: the context of {max_model_len} tokens is full"
    return f"cut at --max-tokens {len(answer.token_ids)}"


def _report(llm: "LLM", output: RequestOutput, timing: Timing) -> dict[str, Any]:
    answer = output.outputs[0]
    return {
        "model": str(llm.path),
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": answer.token_ids,
        **asdict(timing),
    }
