"""What is sent: random prompts of given lengths, the lengths of a trace, or the lines of a file.

A random prompt is made of random words. Each word is one token after a space in the vocabularies of
GPT-2, Llama, Qwen, Gemma and others that know English, so a prompt needs no tokenizer and works on
both endpoints of any server. Its length is told by the server's usage, which the report shows.

Request i of a workload depends on the seed and on i alone. Prompts share no prefix unless the user
asks for one (`prefix_length`), or the trace says so: equal hash ids stand for equal text.

A line of a file is one of these:

    {"prompt": "Once", "max_tokens": 20}             also "output_tokens"
    {"messages": [{"role": "user", "content": "…"}], "max_tokens": 20}
    {"conversations": [{"from": "human", "value": "…"}, …]}             ShareGPT: its first message
    {"custom_id": "a", "url": "/v1/chat/completions", "body": {…}}      OpenAI's Batch API
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, FormatError
from ..files import open_regular, parse_json
from .load_arrivals import BLOCK_TOKENS, TraceEntry

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "LoadRequest",
    "Workload",
    "file_workload",
    "random_workload",
    "trace_workload",
]

COMPLETIONS, CHAT = "completions", "chat/completions"  # paths below the server's URL

MAX_LINE = 16 << 20  # bytes
MAX_LINES = 1_000_000
MAX_FILE = 1 << 30  # bytes

# Common words; each is one token after a space.
_TEXT_OF_WORDS = """
the and was that for with from were his had which not their but been one also two its has first
have are this into they who during after time over her would city song three more against between
other while part about when out all only where him later film before being including team well
then several them through than some made most along around there under four years number episode
used new year began did took said second state became north until game she century end series both
back area early season these day known west south could match included place work such found
called large again built following many men side continued off further just any stage based
received five since due support although role people small video court may served high held
because down next former highway another east members late show six now long led line each feet
released group ship like mill named final position single much left main site use character same
having days northern near route won band what ground music can home order lost top make last set
event tour name major few half island night third local million still came described sent way
often very air stated public white involved never record however original case followed political
album yards towards ships ridge miles remained returned featured federal concert own without
across reported located those wrote system total life history action runs within region areas
completed went company you floor recorded too eastern include among return period opening months
given take eight school games players developed placed track point play southern road downtown
written building level crew matches best arrived range using times saw career version advance
power full family open release run moved largest cast even strong base formed running reached
various attempt border decided special put created head added saying joined appeared started
member result behind black lead agreed
"""
_WORDS = _TEXT_OF_WORDS.split()


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One request: the path below the server's URL, and the body but for the model."""

    path: str
    body: Mapping[str, Any]
    input_length: int | None = None  # tokens of the prompt as it was asked for
    output_length: int | None = None


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests by number, from 0 without end unless `count` says so."""

    request: Callable[[int], LoadRequest]
    count: int | None = None


def random_workload(
    path: str,
    input_length: int,
    output_length: int,
    *,
    range_ratio: float = 0.0,
    prefix_length: int = 0,
    seed: int = 0,
) -> Workload:
    """Prompts of `prefix_length` common tokens and then `input_length` random ones.

    Both lengths are drawn evenly from length · (1 - range_ratio) … length · (1 + range_ratio).
    """
    prefix = _text(np.random.default_rng([seed, 2]), prefix_length)

    def request(i: int) -> LoadRequest:
        rng = np.random.default_rng([seed, 3, i])
        num_input, num_output = (
            int(rng.integers(max(int(n * (1 - range_ratio)), 1), int(n * (1 + range_ratio)) + 1))
            for n in (input_length, output_length)
        )
        text = prefix + _text(rng, num_input)
        return _request(path, text, prefix_length + num_input, num_output)

    return Workload(request)


def trace_workload(path: str, trace: Sequence[TraceEntry], seed: int) -> Workload:
    """Prompts and answers of the lengths of a trace; equal hash ids give equal text."""

    def request(i: int) -> LoadRequest:
        entry = trace[i]
        num_input = max(entry.input_length, 1)
        text, made = "", 0
        for hash_id in entry.hash_ids:
            size = min(BLOCK_TOKENS, num_input - made)
            if size <= 0:
                break
            text += _text(np.random.default_rng([seed, 4, hash_id]), size)
            made += size
        text += _text(np.random.default_rng([seed, 5, i]), num_input - made)
        return _request(path, text, num_input, max(entry.output_length, 1))

    return Workload(request, len(trace))


def file_workload(path: str, file: Path, output_length: int, count: int | None = None) -> Workload:
    """The lines of a file, again from the first after the last.

    `path`: the endpoint of lines that name none. `output_length`: of lines without max_tokens.
    `count`: read so many lines at most. Raises FormatError with the number of a bad line.
    """
    requests: list[LoadRequest] = []
    num_bytes = 0
    with open_regular(file) as opened:
        for number in range(1, MAX_LINES + 2):
            data = opened.readline(MAX_LINE + 1)
            num_bytes += len(data)
            if not data or len(requests) == count:
                break
            where = f"{file}, line {number}"
            if len(data) > MAX_LINE or num_bytes > MAX_FILE or number > MAX_LINES:
                raise FormatError(
                    f"{where}: the file is too large; at most {MAX_LINES} lines of {MAX_LINE} "
                    f"bytes, together {MAX_FILE} bytes, are read"
                )
            data = data.removeprefix(b"\xef\xbb\xbf").strip()
            if data.startswith(b"[") and number == 1:
                raise FormatError(
                    f"{file} is a JSON array; it must have one JSON object on each line "
                    "(jq -c '.[]' makes it so)"
                )
            if data:
                value = parse_json(data, where, max_values=MAX_LINE)
                requests.append(_parse_line(value, path, output_length, where))
    if not requests:
        raise FormatError(f"{file} has no requests")
    return Workload(lambda i: requests[i % len(requests)])


def _parse_line(value: Mapping[str, Any], path: str, output_length: int, where: str) -> LoadRequest:
    # OpenAI's Batch API: the line has the whole body.
    body, url = value.get("body"), value.get("url")
    if isinstance(body, dict) and isinstance(url, str):
        named = next((p for p in (CHAT, COMPLETIONS) if url.endswith(f"/v1/{p}")), None)
        if named is None:
            raise FormatError(
                f"{where}: url is {url!r:.60}; it must be /v1/{CHAT} or /v1/{COMPLETIONS}"
            )
        limits = ("max_tokens", "max_completion_tokens")
        asked = next((body[name] for name in limits if name in body), output_length)
        asked = _check_length(asked, "max_tokens", where)
        kept = {k: v for k, v in body.items() if k not in ("model", "stream", "stream_options")}
        if not any(name in body for name in limits):
            kept["max_tokens"] = asked
        return LoadRequest(named, kept, output_length=asked)
    # The other forms: a prompt or messages, and a limit.
    name = "output_tokens" if "output_tokens" in value else "max_tokens"
    limit = _check_length(value.get(name, output_length), name, where)
    messages, prompt = value.get("messages"), value.get("prompt")
    turns = value.get("conversations")
    if prompt is None and messages is None and isinstance(turns, list) and turns:
        prompt = turns[0].get("value") if isinstance(turns[0], dict) else None
    if isinstance(messages, list) and messages:
        if path != CHAT:
            raise ConfigError(f"{where} has messages, which need --endpoint chat")
        return LoadRequest(CHAT, {"messages": messages, "max_tokens": limit}, None, limit)
    if not isinstance(prompt, str) or not prompt:
        raise FormatError(
            f"{where} has none of: prompt (a text), messages, conversations, url with body"
        )
    return _request(path, prompt, None, limit)


def _check_length(value: object, name: str, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 31:
        raise FormatError(f"{where}: {name} is {value!r:.60}; it must be a positive integer")
    return value


def _request(path: str, text: str, num_input: int | None, num_output: int) -> LoadRequest:
    is_chat = path == CHAT
    said = {"messages": [{"role": "user", "content": text}]} if is_chat else {"prompt": text}
    return LoadRequest(path, {**said, "max_tokens": num_output}, num_input, num_output)


def _text(rng: np.random.Generator, num_words: int) -> str:
    """Random words, a space before each."""
    return "".join(f" {_WORDS[i]}" for i in rng.integers(len(_WORDS), size=num_words).tolist())
