"""`pellucid batch`: many prompts from a file, run as one batch, each answer written as soon as it
is whole.

One idea: a line is a request, and a line is an answer. Answers come in the order in which they end,
with the line number and the `id` of their requests; so an interrupted run keeps what it has. All
lines are read and checked before the model is loaded.
"""

import json
import time
from pathlib import Path
from typing import IO, Any

import click

from ..errors import PellucidError, RequestError
from ..request import RequestOutput, SamplingParams
from .options import EngineOptions, ModelOptions, debug_option, engine_options, model_options

__all__ = ["batch"]

MAX_LINE = 16 << 20  # bytes

_REQUEST_FIELDS = (
    "id",
    "prompt",
    "prompt_token_ids",
    "messages",
    "priority",
    "tenant",
    "cache_salt",
)


@click.command()
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.File("w", encoding="utf-8"),
    default="-",
    help="Where answers go.  [default: standard output]",
)
@model_options
@engine_options
@debug_option
def batch(requests: Path, output: IO[str], model: ModelOptions, engine: EngineOptions) -> None:
    """Answer the REQUESTS of a file, together.

    Each line is a JSON object with a "prompt", "prompt_token_ids" or "messages" (for a model with a
    chat template), and any of SamplingParams' fields ("temperature", "max_tokens", "seed", …);
    beside them "id", "priority", "tenant" and "cache_salt".
    """
    lines = _read(requests)
    from ..engine.llm import LLM
    from ..engine.prompts import tokenize_chat, tokenize_prompt

    llm = LLM(model.name, progress=True, **model.fields(), **engine.fields())
    prompts = []
    for number, (fields, _) in enumerate(lines, 1):
        try:
            if "messages" in fields:
                chat = tokenize_chat(llm.tokenizer, fields["messages"])
                prompts.append(
                    tokenize_prompt(
                        llm.tokenizer,
                        {**fields, "prompt_token_ids": chat.token_ids, "prompt": chat.text},
                    )
                )
            else:
                prompts.append(tokenize_prompt(llm.tokenizer, fields))
        except PellucidError as error:
            raise RequestError(f"{requests}, line {number}: {error}") from None
    start, num_tokens = time.monotonic(), 0
    for i, answer in llm.as_completed(prompts, [params for _, params in lines]):
        num_tokens += sum(len(completion.token_ids) for completion in answer.outputs)
        click.echo(json.dumps(_report(i, lines[i][0], answer), ensure_ascii=False), file=output)
    seconds = time.monotonic() - start
    click.echo(
        f"[{len(lines)} requests in {seconds:.1f} s · {num_tokens / seconds:.0f} tokens/s · "
        f"{llm.summary()}]",
        err=True,
    )


def _read(path: Path) -> list[tuple[dict[str, Any], SamplingParams]]:
    """The fields that concern the request, and its parameters, of every line."""
    lines = []
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
            try:
                lines.append(_parse(line))
            except (PellucidError, ValueError, TypeError, RecursionError) as error:
                raise RequestError(f"{path}, line {number}: {error}") from None
    if not lines:
        raise RequestError(f"{path} holds no request; each line must be a JSON object")
    return lines


def _parse(line: bytes) -> tuple[dict[str, Any], SamplingParams]:
    if len(line) > MAX_LINE:
        raise RequestError(f"the line is longer than {MAX_LINE} bytes")
    value = json.loads(line)
    if not isinstance(value, dict):
        raise RequestError("a request must be a JSON object")
    fields = {name: value.pop(name) for name in _REQUEST_FIELDS if name in value}
    if sum(name in fields for name in ("prompt", "prompt_token_ids", "messages")) != 1:
        raise RequestError("a request needs one of: prompt, prompt_token_ids, messages")
    unknown = sorted(value.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        raise RequestError(f"{unknown[0]!r} is neither a field of a request nor of SamplingParams")
    return fields, SamplingParams(**value)


def _report(index: int, fields: dict[str, Any], answer: RequestOutput) -> dict[str, Any]:
    return {
        "line": index + 1,
        "id": fields.get("id"),
        "prompt_tokens": len(answer.prompt_token_ids),
        "cached_tokens": answer.num_cached_tokens,
        "outputs": [
            {
                "text": o.text,
                "token_ids": o.token_ids,
                "finish_reason": o.finish_reason,
                "stop_reason": o.stop_reason,
            }
            for o in answer.outputs
        ],
    }
