"""The lines that `pellucid batch` reads, and the records that it writes, in two formats.

Pellucid's own format has a prompt and fields of `SamplingParams`:

    {"id": "a", "prompt": "Once", "max_tokens": 20}       or "prompt_token_ids", or "messages"
    {"line": 1, "id": "a", "digest": …, "outputs": [{"text": …}], …}      or with "error": "…"

The other is that of OpenAI's Batch API (`openai_batch.py`), for lines with a "custom_id".

Lines are untrusted: their length, number and depth are bounded. An invalid line gets a record with
the reason, and does not affect the others.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

from ..errors import PellucidError, RequestError
from ..files import parse_json
from ..outputs import CompletionOutput, RequestOutput
from ..sampling_params import SamplingParams
from .answer import report_explanation, report_logprobs

__all__ = [
    "Asked",
    "Line",
    "answer_record",
    "error_record",
    "make_params",
    "parse_own",
    "read_lines",
]

MAX_LINE = 16 << 20  # bytes
MAX_SKIPPED = 1 << 30  # bytes of a line that is too long
MAX_LINES = 10_000_000
MAX_NAME = 512  # characters of an id

_PROMPTS = ("prompt", "prompt_token_ids", "messages")
_STANDING = ("priority", "tenant", "cache_salt", "parse_special")
CHAT = (
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
    "chat_template_kwargs",
)


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the requests."""

    number: int  # from 1, counting blank lines
    name: str | int | None  # its "id" or "custom_id"
    digest: str  # of its bytes
    num_bytes: int
    is_openai: bool = False
    value: Mapping[str, Any] | None = None  # None: the line is invalid,
    error: str | None = None  # for this reason

    @property
    def key(self) -> str:
        """The key by which a continued run finds its answer."""
        if self.name is None:
            return f"line {self.number}"
        return f"{'custom_id' if self.is_openai else 'id'} {self.name!r}"


@dataclass(frozen=True, slots=True)
class Asked:
    """The request in a line."""

    prompt: Mapping[str, Any]  # as `AsyncEngine.generate` takes it; without text for a chat
    messages: Any  # of a chat, otherwise None
    chat: Mapping[str, Any]  # keywords of `render_chat`
    sampling: Mapping[str, Any]  # fields of SamplingParams


def read_lines(file: BinaryIO) -> Iterator[Line]:
    """Every line that is not blank. If two lines have the same id, the second is an error."""
    seen: dict[str, int] = {}
    for number in range(1, MAX_LINES + 2):
        text = file.readline(MAX_LINE + 1)
        if not text:
            return
        if number > MAX_LINES:
            raise RequestError(f"there are more than {MAX_LINES} lines; cut the file in parts")
        if number == 1:
            text = text.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if not text.strip():
            continue
        line = _parse(number, text)
        if len(text) > MAX_LINE:
            _skip_line(file, text, number)
        if line.name is not None:
            first = seen.setdefault(line.key, number)
            if first != number:
                problem = f"line {first} has the same {line.key}"
                line = Line(
                    number, None, line.digest, line.num_bytes, line.is_openai, None, problem
                )
        yield line


def _skip_line(file: BinaryIO, text: bytes, number: int) -> None:
    """Read up to the end of a line that is too long. Raises RequestError if it does not end."""
    skipped = 0
    while text and not text.endswith(b"\n"):
        if skipped > MAX_SKIPPED:
            raise RequestError(f"line {number} does not end within {MAX_SKIPPED} bytes")
        text = file.readline(MAX_LINE)
        skipped += len(text)


def _parse(number: int, text: bytes) -> Line:
    digest = hashlib.sha256(text.strip()).hexdigest()[:32]
    size = len(text)
    if size > MAX_LINE:
        return Line(number, None, digest, size, error=f"the line is longer than {MAX_LINE} bytes")
    try:
        value = parse_json(text, "the line", max_values=MAX_LINE, any_text=True)
    except PellucidError as error:
        return Line(number, None, digest, size, error=str(error))
    is_openai = "custom_id" in value or ("body" in value and "url" in value)
    name = value.get("custom_id" if is_openai else "id")
    if (is_openai or name is not None) and not _is_name(name):
        field, shown = ("custom_id" if is_openai else "id"), json.dumps(name)[:60]
        problem = f"{field} is {shown}; it must be a string of at most {MAX_NAME} characters"
        return Line(number, None, digest, size, is_openai, None, problem)
    assert name is None or isinstance(name, str | int)
    return Line(number, name, digest, size, is_openai, value)


def _is_name(value: object) -> bool:
    if isinstance(value, str):
        return 1 <= len(value) <= MAX_NAME
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def parse_own(value: Mapping[str, Any]) -> Asked:
    """A request in Pellucid's own format. Raises RequestError for an unknown field."""
    # null means that a field is not given; for max_tokens it means no limit
    value = {k: v for k, v in value.items() if v is not None or k == "max_tokens"}
    if sum(name in value for name in _PROMPTS) != 1:
        raise RequestError("a request needs one of: prompt, prompt_token_ids, messages")
    is_chat = "messages" in value
    rest = {name: value[name] for name in value if name not in (*_PROMPTS, *_STANDING, "id")}
    chat = {name: rest.pop(name) for name in CHAT if is_chat and name in rest}
    unknown = sorted(rest.keys() - SamplingParams.__dataclass_fields__.keys())
    if unknown:
        raise RequestError(f"{unknown[0]!r} is neither a field of a request nor of SamplingParams")
    prompt = {name: value[name] for name in (*_PROMPTS[:2], *_STANDING) if name in value}
    return Asked(prompt, value.get("messages"), chat, rest)


def make_params(
    defaults: Mapping[str, Any], asked: Mapping[str, Any], number: int
) -> SamplingParams:
    """The parameters of a request: its own fields, else the defaults.

    A request without a seed gets its line number as the seed, so that an interrupted and continued
    run gives the same answers. Null means that a field is not given.
    """
    return SamplingParams.from_optional(**{"seed": number, **defaults, **asked})


def answer_record(line: Line, output: RequestOutput, timing: Any) -> dict[str, Any]:
    """An answer's record in Pellucid's own format. `timing`: a dataclass of figures, or None."""
    record: dict[str, Any] = {
        **_head(line),
        "prompt_tokens": len(output.prompt_token_ids),
        "cached_tokens": output.num_cached_tokens,
        "outputs": [_completion(completion) for completion in output.outputs],
    }
    if output.prompt_logprobs is not None:
        record["prompt_logprobs"] = [
            None if row is None else report_logprobs(row) for row in output.prompt_logprobs
        ]
    broken = [o.stop_reason for o in output.outputs if o.finish_reason == "error"]
    if broken:
        record["error"] = f"the answer broke off: {broken[0]}"
    if timing is not None:
        record["timing"] = asdict(timing) | report_explanation(output)
    return record


def error_record(line: Line, message: str) -> dict[str, Any]:
    """The record of a request that could not be answered."""
    return {**_head(line), "error": message}


def _head(line: Line) -> dict[str, Any]:
    return {"line": line.number, "id": line.name, "digest": line.digest}


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    found: dict[str, Any] = {
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        found["cumulative_logprob"] = completion.cumulative_logprob
        found["logprobs"] = [report_logprobs(row) for row in completion.logprobs]
    return found
