"""`PoolingParams`: how the hidden states of a prompt become one embedding; `Pooling`: how far that
has come.

An embedding is made of the hidden states after the model's final norm, of the last token or of all
tokens. A decoder's last token has seen the whole prompt. Names are vLLM's, but for `pooling`, which
is llama.cpp's: in vLLM it is an option of the engine.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .checks import check_fields, option
from .errors import ConfigError
from .named_fields import named_fields

__all__ = ["Pooling", "PoolingParams"]

MAX_INT = (1 << 63) - 1


@named_fields("pooling parameter", {"use_activation": "its name here is normalize"})
@dataclass(slots=True, kw_only=True)
class PoolingParams:
    """What an embedding is. Types and bounds are checked when it is built, and again when a request
    is submitted. The engine checks `dimensions` against the model.
    """

    pooling: Literal["last", "mean"] | None = option(
        None,
        help="The hidden state of the last token, or the mean of those of all tokens; None: what "
        "the model's file says, or else the last token's",
    )
    normalize: bool = option(True, help="Scale the embedding to the length 1")
    dimensions: int | None = option(
        None,
        low=1,
        high=1 << 24,
        help="Keep only so many first numbers, for models that were trained for it (Matryoshka, "
        "arXiv:2205.13147); None: all",
    )
    truncate_prompt_tokens: int | None = option(
        None,
        low=-1,
        high=MAX_INT,
        help="Use only so many last tokens of the prompt; -1: as many as the context holds",
    )

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check all fields as declared. Raises ConfigError with the field, its value and what is
        allowed.
        """
        check_fields(self)
        if self.truncate_prompt_tokens == 0:
            raise ConfigError(
                "truncate_prompt_tokens is 0; it must be at least 1, -1 for what fits, or None"
            )

    def clone(self) -> "PoolingParams":
        """A checked copy: later changes by the caller do not affect a request."""
        return replace(self)


@dataclass(slots=True, eq=False)
class Pooling:
    """The state of one embedding. Hidden states are added in order of position, each once: a
    position that is computed again, after a preemption, is not needed again.
    """

    params: PoolingParams
    num_tokens: int  # of the prompt
    next: int = field(init=False)  # the first position whose hidden state is still needed
    total: Any = None  # [C] in float64, the sum of the hidden states that were added
    embedding: list[float] | None = None  # once all are added

    def __post_init__(self) -> None:
        self.next = 0 if self.params.pooling == "mean" else self.num_tokens - 1

    def needed(self, start: int, stop: int) -> range:
        """The positions of start … stop - 1 whose hidden states are needed."""
        return range(max(start, self.next), stop)
