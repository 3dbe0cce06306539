"""`SamplingParams`: how a request chooses its tokens, and when it stops. Names, meanings, units and
defaults are vLLM's; only `typical_p` is not in vLLM.
"""

import itertools
import re
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated, Protocol, Self, TypeVar

from .checks import Bounds, check_fields, check_value, option, show
from .errors import ConfigError, RequestError
from .named_fields import check_names, named_fields
from .structured_params import StructuredOutputsParams
from .units import format_count

__all__ = [
    "MAX_LOGPROBS",
    "MAX_N",
    "MAX_STOP_STRINGS",
    "SamplingParams",
    "TokenId",
    "listed_params",
    "params_for_prompts",
]

MAX_LOGPROBS = 1024  # logprobs per position that one request may ask for
MAX_STOP_STRINGS = 64
MAX_N = 128
MAX_LOGIT_BIAS = 4096  # entries
MAX_STOP_TOKEN_IDS = 1024
MAX_BAD_WORDS = 1024
MAX_STRING = 1024  # characters of one stop string or bad word
# the largest of any vocabulary (ModelConfig); the engine checks against the model's own
MAX_TOKEN_ID = (1 << 24) - 1
MAX_SCALE = 1e6  # of temperature and repetition_penalty: larger values are mistakes
MAX_INT = (1 << 63) - 1

_DIGITS = re.compile("[0-9]{1,9}")  # a token id as a key of JSON

TokenId = Annotated[int, Bounds(low=0, high=MAX_TOKEN_ID)]
Text = Annotated[str, Bounds(low=1, high=MAX_STRING)]  # a stop string or a bad word

_NO_BEAMS = "there is no beam search"
# Parameters of vLLM, transformers and llama.cpp that have another name here, or none.
ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        "best_of": "all n answers are returned; choose among them by cumulative_logprob",
        "do_sample": "temperature=0 is greedy, and any other temperature samples",
        "early_stopping": _NO_BEAMS,
        "extra_args": "there are no plugins that would read it",
        "flat_logprobs": "logprobs are a mapping for each position",
        "guided_decoding": "its name here is structured_outputs",
        "length_penalty": _NO_BEAMS,
        "logits_processors": "logit_bias, allowed_token_ids, bad_words and structured_outputs "
        "change logits",
        "max_new_tokens": "its name here is max_tokens",
        "n_predict": "its name here is max_tokens",
        "num_beams": _NO_BEAMS,
        "num_return_sequences": "its name here is n",
        "output_kind": "LLM.generate returns whole answers, and LLM.stream growing ones",
        "repeat_penalty": "its name here is repetition_penalty",
        "skip_reading_prefix_cache": "the cache_salt of a prompt keeps it apart from others",
        "spaces_between_special_tokens": "nothing is put between special tokens",
        "use_beam_search": _NO_BEAMS,
    }
)


@named_fields("sampling parameter", ELSEWHERE)
@dataclass(slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen, and when the output stops.

    They act on a row of logits in this order: logit_bias, allowed and banned tokens (and the mask
    of a constrained output), penalties, temperature, top_k, typical_p, top_p, min_p, then one draw
    (`sampling/sampler.py`). `temperature=0` is greedy: it takes the largest logit after bias, bans
    and penalties. Ties go to the lower token id.

    Types and bounds are checked when it is built, and again when a request is submitted. Nothing is
    clamped. Lists and mappings are copied.
    """

    n: int = option(1, low=1, high=MAX_N, help="Completions per prompt")
    temperature: float = option(
        1.0, low=0.0, high=MAX_SCALE, help="Logits are divided by it; 0: the likeliest token"
    )
    top_k: int = option(0, low=-1, high=MAX_INT, help="Keep the k likeliest tokens; 0 or -1: all")
    top_p: float = option(
        1.0, above=0.0, high=1.0, help="Keep the fewest likeliest tokens that hold this probability"
    )
    min_p: float = option(
        0.0, low=0.0, high=1.0, help="Keep tokens at least this likely, relative to the likeliest"
    )
    typical_p: float = option(
        1.0,
        above=0.0,
        high=1.0,
        help="Keep the tokens whose surprise is nearest the entropy, this much probability of them "
        "(arXiv:2202.00666)",
    )
    repetition_penalty: float = option(
        1.0,
        above=0.0,
        high=MAX_SCALE,
        help="Divides positive and multiplies negative logits of tokens that prompt or output hold "
        "(arXiv:1909.05858)",
    )
    presence_penalty: float = option(
        0.0, low=-2.0, high=2.0, help="Subtracted once from each token that the output holds"
    )
    frequency_penalty: float = option(
        0.0, low=-2.0, high=2.0, help="Subtracted for each occurrence of a token in the output"
    )
    logit_bias: Mapping[TokenId, Annotated[float, Bounds(low=-100.0, high=100.0)]] | None = option(
        None, high=MAX_LOGIT_BIAS, help="Token id to what is added to its logit"
    )
    allowed_token_ids: Sequence[TokenId] | None = option(
        None, low=1, high=MAX_TOKEN_ID + 1, help="No other token may be drawn"
    )
    bad_words: Sequence[Text] | None = option(
        None, high=MAX_BAD_WORDS, help="Strings that may not be completed"
    )
    seed: int | None = option(
        None,
        low=-(1 << 63),
        high=(1 << 64) - 1,
        help="A request with a seed gives the same text whatever else runs; None or -1: drawn",
    )
    stop: str | Sequence[Text] | None = option(
        None, high=MAX_STOP_STRINGS, help="The text ends before the first of these; kept as a list"
    )
    stop_token_ids: Sequence[TokenId] | None = option(
        None, high=MAX_STOP_TOKEN_IDS, help="Tokens that end the output, beside the model's own"
    )
    include_stop_str_in_output: bool = option(
        False, help="The stop string that ended the output is part of its text"
    )
    ignore_eos: bool = option(False, help="An end of sequence is a token like any other")
    max_tokens: int | None = option(
        16, low=1, high=MAX_INT, help="Tokens of the output; None: as many as the context holds"
    )
    min_tokens: int = option(
        0, low=0, high=MAX_INT, help="No end of sequence or stop before so many tokens"
    )
    logprobs: int | None = option(
        None,
        low=-1,
        high=MAX_LOGPROBS,
        help="Report so many likeliest tokens at each position of the output, beside the chosen "
        "one; -1: the whole vocabulary",
    )
    prompt_logprobs: int | None = option(
        None, low=-1, high=MAX_LOGPROBS, help="The same for each position of the prompt"
    )
    structured_outputs: StructuredOutputsParams | None = option(
        None, help="What the text of the answer must be: JSON, a regex, a choice or a grammar"
    )
    truncate_prompt_tokens: int | None = option(
        None,
        low=-1,
        high=MAX_INT,
        help="Use only so many last tokens of the prompt; -1: as many as leave room for max_tokens",
    )
    skip_special_tokens: bool = option(True, help="Special tokens are left out of the text")
    detokenize: bool = option(True, help="Turn tokens into text; False: token ids alone")

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Check, convert and copy all fields as declared. Raises ConfigError with the field, its
        value and what is allowed.

        The engine checks what depends on the model: token ids beyond its vocabulary, prompts beyond
        its context.
        """
        if self.stop is None or isinstance(self.stop, str):
            self.stop = [] if self.stop is None else [self.stop]
        check_fields(self)
        if self.seed == -1:
            self.seed = None
        if self.truncate_prompt_tokens == 0:
            raise ConfigError(
                "truncate_prompt_tokens is 0; it must be at least 1, -1 for what fits, or None"
            )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens is {self.min_tokens}; it must be at most max_tokens, which is "
                f"{self.max_tokens}"
            )
        if self.stop and not self.detokenize:
            raise ConfigError(
                f"stop is {show(self.stop)}; stop strings are found in text, so detokenize must "
                "be True"
            )

    def clone(self) -> "SamplingParams":
        """A checked copy that shares no list or mapping with this one. Each request runs with a
        clone, so later changes by the caller do not affect it.
        """
        return replace(self)

    @classmethod
    def from_optional(cls, **fields: object) -> "SamplingParams":
        """Build from fields of JSON, as vLLM's method does: null means the default, and keys of
        logit_bias may be strings of digits. Raises ConfigError for an unknown name.
        """
        check_names(cls, fields)  # also those that are null
        # for max_tokens None has a meaning of its own
        given = {
            name: value
            for name, value in fields.items()
            if value is not None or name == "max_tokens"
        }
        bias = given.get("logit_bias")
        if isinstance(bias, Mapping):
            given["logit_bias"] = {
                int(key) if isinstance(key, str) and _DIGITS.fullmatch(key) else key: value
                for key, value in bias.items()
            }
        structured = given.get("structured_outputs")
        if isinstance(structured, Mapping):
            given["structured_outputs"] = StructuredOutputsParams.from_optional(**structured)
        return cls(**given)  # type: ignore[arg-type]


class _Clonable(Protocol):
    def clone(self) -> Self: ...


_P = TypeVar("_P", bound=_Clonable)


def params_for_prompts(given: object, count: int) -> list[SamplingParams]:
    """`listed_params` of SamplingParams."""
    return listed_params("sampling_params", given, count, SamplingParams)


def listed_params(field: str, given: object, count: int, kind: type[_P]) -> list[_P]:
    """A clone for each of `count` prompts. `given`: None (the defaults), one for all, or a list.

    Raises ConfigError if an entry is not of `kind` or has a value that is not allowed, and
    RequestError if their number is not that of the prompts. They name the `field`.
    """
    if given is None or isinstance(given, kind):
        one = kind() if given is None else given
        return [one.clone() for _ in range(count)]
    try:
        if isinstance(given, str | bytes | Mapping):
            raise TypeError
        listed = list(itertools.islice(given, count + 1))  # type: ignore[call-overload]
    except TypeError:  # an array without dimensions is an Iterable, too
        raise ConfigError(
            f"{field} is {show(given)}; it must be {kind.__name__}, one for each prompt, or None"
        ) from None
    if len(listed) != count:
        number = len(given) if isinstance(given, Sized) else len(listed)
        raise RequestError(
            f"{number} {field} are given for {format_count(count, 'prompt')}; give one, or one for "
            "each"
        )
    clones = []
    for i, params in enumerate(listed):
        try:
            clones.append(check_value(f"{field}[{i}]", params, kind).clone())
        except ConfigError as error:
            is_named = not isinstance(params, kind)
            raise ConfigError(str(error) if is_named else f"{field}[{i}]: {error}") from None
    return clones
