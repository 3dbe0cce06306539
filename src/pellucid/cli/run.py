"""`pellucid run`: one prompt, one answer, written as it is generated.

Standard output holds the answer and nothing else, so it can be piped. The times and the sampling
parameters go to standard error. With `--json`, standard output holds one JSON object instead.
"""

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, RequestError
from ..outputs import Logprob, RequestOutput
from .answer import (
    Timing,
    explain_answer,
    load_llm,
    render_chat,
    report_explanation,
    report_logprobs,
)
from .inputs import open_input, open_stdin
from .options import (
    ModelOptions,
    Sampling,
    SamplingOptions,
    debug_option,
    json_option,
    model_options,
    sampling_options,
    template_options,
)
from .terminal import StreamPrinter, one_line, print_table, say

if TYPE_CHECKING:
    from ..engine.llm import LLM

__all__ = ["run"]

MAX_PROMPT = 1 << 26  # bytes


@click.command()
@click.argument("prompt", required=False)
@click.option(
    "-f",
    "--file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read the prompt from a file.",
)
@model_options()
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@click.option(
    "--raw", is_flag=True, help="Continue the prompt as it is, without the model's chat template."
)
@click.option(
    "--no-special",
    is_flag=True,
    help="With --raw: read the names of special tokens in the prompt as plain text.",
)
@template_options
@sampling_options(max_tokens=512, leave_out=("n",))
@json_option
@click.option(
    "--stats/--no-stats",
    " /-q",
    default=None,
    help="Show on standard error what the answer cost and how it was sampled (-q: nothing). "
    "--stats also tells why it took that long.",
)
@debug_option
def run(
    prompt: str | None,
    file: Path | None,
    model: ModelOptions,
    system: str | None,
    raw: bool,
    no_special: bool,
    template: dict[str, Any],
    sampling: SamplingOptions,
    as_json: bool,
    stats: bool | None,
) -> None:
    """Answer PROMPT and stop. PROMPT is read from standard input if it is "-", or if it is missing
    and input is piped.

    If the model has a chat template, PROMPT is a user's message; otherwise it is a text to
    continue.
    """
    sampling.check()
    _check_options(prompt, file, system, raw, no_special, template)
    text = _read_prompt(prompt, file)
    llm = load_llm(model, for_chat=not raw)
    chosen = sampling.choose(llm.generation_config)
    if raw or (llm.tokenizer.chat_template is None and "chat_template" not in template):
        if system is not None:
            raise ConfigError(f"{model.name} has no chat template, so it cannot take --system")
        asked: dict[str, Any] = {"prompt": text, "parse_special": not no_special}
    else:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": text})
        asked = render_chat(llm.tokenizer, messages, template, llm.max_model_len)
    # Write the answer as it grows.
    printer = None if as_json else StreamPrinter()
    for output in llm.stream(asked, chosen.params()):
        if printer is not None:
            printer.show(output.outputs[0].text)
    if printer is not None:
        printer.end()
    # Report its times.
    timing = Timing.of(output, time.monotonic())
    if as_json:
        report = _report(llm, output, timing, chosen)
        if stats is not False:
            report |= report_explanation(output)
        click.echo(json.dumps(report, ensure_ascii=False, allow_nan=False))
    else:
        _print_logprobs(output)
        if stats is not False:
            ending = _ending(output, llm.max_model_len)
            say(f"[{timing} · {chosen} · {ending}]")
        if stats:
            say(f"[{explain_answer(output)}]")
    if output.outputs[0].finish_reason == "error":
        raise RequestError(f"the answer broke off: {output.outputs[0].stop_reason}")


def _check_options(
    prompt: str | None,
    file: Path | None,
    system: str | None,
    raw: bool,
    no_special: bool,
    template: Mapping[str, Any],
) -> None:
    """Refuse options that contradict each other."""
    if prompt is not None and file is not None:
        raise click.UsageError("give a PROMPT or --file, not both")
    if raw and (system is not None or template):
        name = "--system is a message" if system is not None else "--chat-template is a part"
        raise click.UsageError(f"{name} of the chat, which --raw leaves out: give one of the two")
    if no_special and not raw:
        raise click.UsageError(
            "--no-special needs --raw: in a chat the prompt is plain text in any case"
        )


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the command line, a file or standard input, as text that UTF-8 can encode."""
    if prompt is None and file is None and sys.stdin.isatty():
        raise click.UsageError(
            'give a PROMPT, or pipe one in ("-"); for a conversation there is `pellucid chat`'
        )
    try:
        if file is not None:
            with open_input(file) as opened:
                text = _decode(opened.read(MAX_PROMPT + 1))
        elif prompt is None or prompt == "-":
            text = _decode(open_stdin().read(MAX_PROMPT + 1))
        else:
            text = prompt
            text.encode()  # bytes of the command line that were not UTF-8 fail here
    except UnicodeError:
        raise click.UsageError("the prompt is not UTF-8 text") from None
    if not text:
        raise click.UsageError("the prompt is empty")
    return text


def _decode(data: bytes) -> str:
    if len(data) > MAX_PROMPT:
        raise click.UsageError(f"the prompt is longer than {MAX_PROMPT} bytes")
    return data.decode()


def _ending(output: RequestOutput, max_model_len: int) -> str:
    """The reason why the answer ended, in words."""
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


def _print_logprobs(output: RequestOutput) -> None:
    """A table on standard error: each token, its logprob, and the likeliest others."""
    answer = output.outputs[0]
    if answer.logprobs is None:
        return
    rows = []
    for token_id, row in zip(answer.token_ids, answer.logprobs, strict=True):
        others = [_show(entry) for other, entry in row.items() if other != token_id]
        chosen = row[token_id]
        rows.append([repr(chosen.decoded_token), f"{chosen.logprob:.4f}", "  ".join(others)])
    print_table(["token", "logprob", "others"], rows, err=True)


def _show(entry: Logprob) -> str:
    return f"{entry.decoded_token!r} {entry.logprob:.4f}"


def _report(
    llm: "LLM", output: RequestOutput, timing: Timing, sampling: Sampling
) -> dict[str, Any]:
    answer = output.outputs[0]
    found: dict[str, Any] = {
        "model": str(llm.path),
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "token_ids": answer.token_ids,
        "sampling": dict(sampling.values),
        **asdict(timing),
    }
    if answer.logprobs is not None:
        found["logprobs"] = list(map(report_logprobs, answer.logprobs))
    if output.prompt_logprobs is not None:
        rows = output.prompt_logprobs
        found["prompt_logprobs"] = [None if row is None else report_logprobs(row) for row in rows]
    return found
