"""Embeddings: a step's hidden states are pooled here, for requests that ask for an embedding.

A mean is summed in float64 and in order of position, each position once. So a prompt of any length
is pooled over any number of steps, and gives the same bits however it was cut into them, if the
backend is batch-invariant.

Shapes: E rows of hidden states of a step, C hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, PellucidError, PromptTooLongError, RequestError
from ..outputs import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    Explanation,
    PooledOutput,
    RequestMetrics,
    RequestOutput,
)
from ..pooling_params import Pooling, PoolingParams
from ..request import Request
from ..tokenizer import Tokenizer
from .admission import Submission
from .output import OutputGroup
from .prompts import TokenizedPrompt

__all__ = [
    "as_embedding",
    "build_group",
    "check_lengths",
    "needed_positions",
    "pool_hidden_states",
    "resolve_pooling",
]


def resolve_pooling(params: PoolingParams, own: str | None) -> PoolingParams:
    """Parameters that name a pooling: their own, or that of the model's file, or the last token.
    Raises ConfigError if the file names a kind that does not exist here.
    """
    if params.pooling is None and own not in (None, "last", "mean"):
        raise ConfigError(
            f"pooling is None, and the model's own is {own!r}, which is not supported; it must be "
            "one of: last, mean"
        )
    pooling: Any = params.pooling or own or "last"
    return replace(params, pooling=pooling)


def check_lengths(prompts: Sequence[TokenizedPrompt], most: int | None) -> None:
    """Raise PromptTooLongError, naming the prompt, if one has more than `most` tokens."""
    for i, prompt in enumerate(prompts):
        if most is not None and len(prompt.token_ids) > most:
            name = "the prompt" if len(prompts) == 1 else f"prompts[{i}]"
            raise PromptTooLongError(
                f"{name} has {len(prompt.token_ids)} tokens; it must be at most {most} "
                f"(max_model_len is {most}); truncate_prompt_tokens uses only its last ones"
            )


def needed_positions(request: Request) -> range:
    """The positions of this step whose hidden states the request needs."""
    start = request.num_computed_tokens
    stop = start + request.num_scheduled_tokens
    return range(0) if request.pooling is None else request.pooling.needed(start, stop)


def pool_hidden_states(
    requests: Sequence[Request],
    hidden: NDArray[np.float32] | None,
    errors: dict[str, PellucidError],
) -> None:
    """Add a step's hidden states [E, C], which lie in the order of its requests. A request whose
    last position is added gets its embedding, or an entry of `errors` if that is not finite.
    """
    if hidden is None or not len(hidden):
        return
    first = 0
    for request in requests:
        positions, pooling = needed_positions(request), request.pooling
        if pooling is None or not positions:
            continue
        rows = hidden[first : first + len(positions)]  # [positions, C]
        first += len(positions)
        if pooling.total is None:
            pooling.total = np.zeros(rows.shape[1])
        for row in rows:  # one by one: a sum over an axis has an order of its own
            pooling.total += row
        pooling.next = positions.stop
        if pooling.next == pooling.num_tokens:
            if np.isfinite(pooling.total).all():
                pooling.embedding = _embedding(pooling).tolist()
            else:
                errors[request.request_id] = RequestError(
                    "the embedding is not finite: the model's hidden states hold NaN or infinity"
                )


def _embedding(pooling: Pooling) -> NDArray[np.float32]:
    """The finished embedding [dimensions]."""
    params = pooling.params
    vector: NDArray[np.float64] = pooling.total
    if params.pooling == "mean":
        vector = vector / pooling.num_tokens
    vector = vector[: params.dimensions]
    if params.normalize:
        length = np.sqrt(np.sum(vector * vector))
        vector = vector / (length if length > 0 else 1.0)
    return vector.astype(np.float32)


class _EmbeddingGroup(OutputGroup):
    """The one request of an embedding. The embedding comes when its first token would."""

    def finish(self, request: Request, now: float) -> None:
        super().finish(request, now)
        if request.finish_reason == "stop":
            self._first_token_time = self._last_token_time = now

    def output(self, num_computed: int) -> RequestOutput:
        plain = super().output(num_computed)
        given: dict[str, Any] = {f.name: getattr(plain, f.name) for f in fields(plain)}
        pooling = self.requests[0].pooling
        return PooledOutput(**given, embedding=None if pooling is None else pooling.embedding)


def build_group(
    submission: Submission,
    requests: list[Request],
    tokenizer: Tokenizer,
    now: float,
    explain: Callable[[RequestMetrics], Explanation] | None,
) -> OutputGroup:
    """What collects the outputs of a submission's requests; the arguments are `OutputGroup`'s."""
    kind = OutputGroup if requests[0].pooling is None else _EmbeddingGroup
    return kind(
        submission.request_id,
        submission.prompt.text,
        requests,
        tokenizer,
        now,
        explain,
        only_whole=submission.only_whole,
    )


def as_embedding(output: RequestOutput, name: str) -> EmbeddingRequestOutput:
    """The embedding of a finished output. Raises RequestError, with the prompt's `name`, if it has
    none: the engine ended it with an error, or it was aborted.
    """
    if not isinstance(output, PooledOutput) or output.embedding is None:
        (ended,) = output.outputs
        raise RequestError(f"{name}: {ended.stop_reason or 'the request was aborted'}")
    return EmbeddingRequestOutput(
        request_id=output.request_id,
        outputs=EmbeddingOutput(output.embedding),
        prompt=output.prompt,
        prompt_token_ids=output.prompt_token_ids,
        finished=output.finished,
        metrics=output.metrics,
        num_cached_tokens=output.num_cached_tokens,
    )
