"""Turns token ids into what the caller sees: text, logprobs, finish reasons and times of the n
completions of one prompt.

Outputs are cumulative: each call of `output()` returns the whole answer so far, as
vLLM's `RequestOutput` does. A caller that streams prints the part that is new.
"""

from collections.abc import Callable

from ..outputs import (
    CompletionOutput,
    Explanation,
    FinishReason,
    Logprob,
    LogprobsOnePosition,
    RequestMetrics,
    RequestOutput,
)
from ..request import Request
from ..tokenizer import Detokenizer, Tokenizer

__all__ = ["OutputGroup"]


class OutputGroup:
    """The n requests of one prompt, and their texts."""

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        requests: list[Request],
        tokenizer: Tokenizer,
        now: float,
        explain: Callable[[RequestMetrics], Explanation] | None = None,
        *,
        only_whole: bool = False,
    ) -> None:
        """`now` is the arrival time in seconds of the engine's clock. `explain` is asked when a
        reader of the outputs wants to know why it took that long. `only_whole`: the reader wants
        only the finished output.
        """
        self.request_id = request_id
        self.requests = requests
        self._only_whole = only_whole
        self._prompt = prompt
        # a copy: a reader that changes its output changes no request
        self._prompt_token_ids = list(requests[0].prompt_token_ids)
        self._tokenizer = tokenizer
        # times in seconds, as in `RequestMetrics`
        self._arrival_time = now
        self._first_scheduled_time: float | None = None
        self._first_token_time: float | None = None
        self._last_token_time: float | None = None
        self._finished_time: float | None = None
        self._explain = explain
        self._computed_before = 0  # tokens that the engine had computed when its first step began
        self._num_computed = 0  # tokens of its own that were computed
        self._texts = {
            request.request_id: _detokenizer(request, tokenizer)
            for request in requests
            if request.params.detokenize
        }

    def request(self, request_id: str) -> Request:
        """The request with this id."""
        return next(request for request in self.requests if request.request_id == request_id)

    @property
    def is_finished(self) -> bool:
        """True if all of them have ended."""
        return all([request.is_finished for request in self.requests])

    @property
    def is_wanted(self) -> bool:
        """True if the reader wants the output so far."""
        return not self._only_whole or self.is_finished

    def schedule(self, now: float, num_tokens: int, num_computed: int) -> None:
        """Record that a step computes so many of its tokens. `num_computed`: tokens that the engine
        had computed before.
        """
        if self._first_scheduled_time is None:
            self._first_scheduled_time = now
            self._computed_before = num_computed
        self._num_computed += num_tokens

    def advance(
        self, request: Request, token_id: int, reason: FinishReason | None, now: float
    ) -> bool:
        """Add a new token, with the finish reason if the request ends with it. Returns True if the
        text now holds a stop string, which becomes the request's stop_reason.
        """
        if self._first_token_time is None:
            self._first_token_time = now
        self._last_token_time = now
        text = self._texts.get(request.request_id)
        if text is None:
            return False
        # A token that ended the request by its id is left out of the text, unless requested.
        if reason != "stop" or request.params.include_stop_str_in_output:
            text.push((token_id,))
        if text.stopped_by is not None:
            request.stop_reason = text.stopped_by
        return text.stopped_by is not None

    def finish(self, request: Request, now: float) -> None:
        """Release the text that was held back, because no token follows."""
        if request.request_id in self._texts:
            self._texts[request.request_id].finish()
        if self.is_finished:
            self._finished_time = now

    def output(self, num_computed: int) -> RequestOutput:
        """The answer so far. `num_computed`: tokens that the engine has computed so far."""
        first = self.requests[0]
        return RequestOutput(
            request_id=self.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[self._completion(i, request) for i, request in enumerate(self.requests)],
            finished=self.is_finished,
            metrics=self._metrics(num_computed),
            prompt_logprobs=list(first.prompt_logprobs) or None,
            num_cached_tokens=first.num_cached_tokens,
        )

    def _metrics(self, num_computed: int) -> RequestMetrics:
        others = num_computed - self._computed_before - self._num_computed
        metrics = RequestMetrics(
            arrival_time=self._arrival_time,
            first_scheduled_time=self._first_scheduled_time,
            first_token_time=self._first_token_time,
            last_token_time=self._last_token_time,
            finished_time=self._finished_time,
            num_prompt_tokens=len(self._prompt_token_ids),
            num_cached_tokens=self.requests[0].num_cached_tokens,
            num_output_tokens=sum([len(r.output_token_ids) for r in self.requests]),
            num_completions=len(self.requests),
            num_other_tokens=max(0, others) if self._num_computed else 0,
        )
        if self._explain is not None:
            metrics.explainer = self._explain
        return metrics

    def _completion(self, index: int, request: Request) -> CompletionOutput:
        text = self._texts.get(request.request_id)
        logprobs = total = None
        if request.params.logprobs is not None:
            logprobs = list(request.logprobs)
            tokens = zip(logprobs, request.output_token_ids, strict=False)
            total = sum([row[token].logprob for row, token in tokens])
        completion = CompletionOutput(
            index,
            text.text if text is not None else "",
            [],
            total,
            logprobs,
            request.finish_reason,
            request.stop_reason,
        )
        completion.share_tokens(request.output_token_ids)
        return completion

    def named(self, row: LogprobsOnePosition) -> LogprobsOnePosition:
        """The same candidates with their tokens' text and bytes, if the request wants text."""
        if not self._texts:
            return row
        return {
            token: Logprob(
                candidate.logprob,
                candidate.rank,
                self._tokenizer.token_text(token),
                self._tokenizer.token_bytes(token),
            )
            for token, candidate in row.items()
        }


def _detokenizer(request: Request, tokenizer: Tokenizer) -> Detokenizer:
    params = request.params
    return Detokenizer(
        tokenizer,
        prompt_tail=request.prompt_token_ids[-8:],
        stop=list(params.stop or ()),
        include_stop=params.include_stop_str_in_output,
        skip_special=params.skip_special_tokens,
        min_tokens=params.min_tokens,
    )
