"""Shared by the commands that answer prompts: loading a model, the figures of an answer, its
logprobs.

The two speeds are those of prefill and decode. Prefill computes many tokens at a time and is
compute-bound; decode computes one token at a time and is bound by memory bandwidth. Times are
seconds of the engine's monotonic clock.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..outputs import LogprobsOnePosition, RequestOutput
from ..units import format_count
from .options import ModelOptions

if TYPE_CHECKING:
    from ..engine.llm import LLM
    from ..tokenizer import Tokenizer

__all__ = [
    "Timing",
    "explain_answer",
    "load_llm",
    "render_chat",
    "report_explanation",
    "report_logprobs",
]


def load_llm(options: ModelOptions, *, for_chat: bool) -> "LLM":
    """Load a model, fetching it first where it is a name and not here. `for_chat`: the process that
    renders chat templates starts meanwhile.
    """
    if for_chat:
        from ..tokenizer.chat_template import start_rendering

        start_rendering()
    from ..engine.llm import LLM

    return LLM(options.name, progress=True, **options.fields())


def report_explanation(output: RequestOutput) -> dict[str, Any]:
    """Why it took that long, as JSON. What is unknown, because the machine was not measured, is
    None. `speculation` is there where the engine speculates.
    """
    found = output.metrics.explain()
    report: dict[str, Any] = {
        "bound": found.bound,
        "share_of_ceiling": found.share_of_ceiling,
        "explanation": found.sentence,
    }
    if output.speculation is not None:
        receipt = output.speculation
        report["speculation"] = {
            **asdict(receipt),
            "num_draft_tokens": receipt.num_draft_tokens,
            "num_accepted_tokens": receipt.num_accepted_tokens,
            "tokens_per_step": receipt.tokens_per_step,
        }
    return report


def explain_answer(output: RequestOutput) -> str:
    """Why it took that long, in one sentence, and a second one on speculation."""
    sentences = [output.metrics.explanation]
    if output.speculation is not None:
        sentences.append(f"speculation: {output.speculation}")
    return "; ".join(sentences)


def report_logprobs(row: LogprobsOnePosition) -> dict[str, Any]:
    """The candidates of one position as JSON, by token id as a string."""
    return {
        str(token_id): {
            "logprob": entry.logprob,
            "rank": entry.rank,
            "decoded_token": entry.decoded_token,
            "bytes": None if entry.token_bytes is None else list(entry.token_bytes),
        }
        for token_id, entry in row.items()
    }


def render_chat(
    tokenizer: "Tokenizer",
    messages: Sequence[Mapping[str, Any]],
    template: Mapping[str, Any],
    max_tokens: int | None,
) -> dict[str, Any]:
    """A conversation as a prompt. `template`: keywords of `tokenize_chat`. `max_tokens`: a longer
    prompt is refused.
    """
    from ..engine.prompts import tokenize_chat

    rendered = tokenize_chat(tokenizer, messages, max_tokens=max_tokens, **template)
    return {"prompt": rendered.text, "prompt_token_ids": rendered.token_ids}


@dataclass(frozen=True, slots=True)
class Timing:
    """The figures of one answer. A speed is None if there was nothing to measure."""

    prompt_tokens: int
    completion_tokens: int
    time_in_queue: float | None
    time_to_first_token: float | None
    prompt_tokens_per_second: float | None
    # over the tokens after the first, which is sampled at the end of prefill
    decode_tokens_per_second: float | None
    cached_tokens: int = 0  # of the prompt: found in the cache
    time_in_prefill: float | None = None
    time_in_decode: float | None = None

    @classmethod
    def of(cls, output: RequestOutput, now: float) -> "Timing":
        """The figures of an output that finished, or was stopped at the time `now`."""
        arrival, first = output.metrics.arrival_time, output.metrics.first_token_time
        end = now if output.metrics.finished_time is None else output.metrics.finished_time
        prompt, answer = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=answer,
            time_in_queue=output.metrics.time_in_queue,
            time_to_first_token=None if first is None else first - arrival,
            prompt_tokens_per_second=None
            if first is None
            else _rate(prompt - output.num_cached_tokens, first - arrival),
            decode_tokens_per_second=None
            if first is None or answer < 2
            else _rate(answer - 1, end - first),
            cached_tokens=output.num_cached_tokens,
            time_in_prefill=output.metrics.time_in_prefill,
            time_in_decode=output.metrics.time_in_decode,
        )

    def __str__(self) -> str:
        parts = [
            f"prompt {format_count(self.prompt_tokens, 'token')}"
            f"{_speed(self.prompt_tokens_per_second)}"
        ]
        parts.append(
            f"answer {format_count(self.completion_tokens, 'token')}"
            f"{_speed(self.decode_tokens_per_second)}"
        )
        if self.time_to_first_token is not None:
            parts.append(f"first token after {self.time_to_first_token:.2f} s")
        return " · ".join(parts)


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if seconds > 0 else None


def _speed(rate: float | None) -> str:
    return "" if rate is None else f" ({rate:.1f}/s)"
