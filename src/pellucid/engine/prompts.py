"""Turns prompts and conversations, as callers pass them, into token ids. `LLM` and `AsyncEngine`
share it.

A prompt is text, token ids, or a mapping (`TextPrompt`, `TokensPrompt`) that has one of the two,
and may have a priority, a tenant and a cache salt. Special tokens that a text prompt spells
("<|fim_prefix|>") are parsed as such, as in vLLM and llama.cpp; `parse_special=False` reads them as
plain text. A text that begins with bos gets no second bos. vLLM and llama.cpp add a second one
(llama.cpp with a warning), which no model was trained on.

In a conversation only the model's own template writes special tokens: a message that spells one is
plain text.

All of this is untrusted input. It is copied, and bounded in length, before it is used.
"""

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, NotRequired, TypeAlias, TypedDict

import numpy as np

from ..checks import Bounds, check_fields, check_value, option, show, unknown_name
from ..errors import PellucidError, RequestError
from ..pooling_params import PoolingParams
from ..sampling_params import SamplingParams, TokenId
from ..tokenizer import Tokenizer
from ..units import format_count

__all__ = [
    "Message",
    "Prompt",
    "TextPrompt",
    "TokenizedPrompt",
    "TokensPrompt",
    "check_prompt_ids",
    "list_conversations",
    "list_prompts",
    "longest_prompt",
    "tokenize_chat",
    "tokenize_prompt",
    "tokenize_prompts",
    "truncate_prompt",
    "with_priorities",
    "with_standing",
]

MAX_PRIORITY = 1 << 31
MAX_NAME = 256  # characters of a tenant's name or a salt
MAX_PROMPTS = 1 << 20  # of one call
MAX_PROMPT_TOKENS = 1 << 24  # no model's context is longer
MAX_PROMPT_CHARACTERS = 1 << 26

_Priority = Annotated[int, Bounds(low=-MAX_PRIORITY, high=MAX_PRIORITY)]


class _Standing(TypedDict):
    """How a prompt's request is scheduled and cached among others."""

    priority: NotRequired[int]  # the smaller is served first, where the policy is "priority"
    tenant: NotRequired[str]  # who asks: what the policy "fair" is fair to
    cache_salt: NotRequired[str]  # prefixes are shared among requests of one salt


class TextPrompt(_Standing):
    """A prompt as text."""

    prompt: str
    parse_special: NotRequired[bool]  # False: special tokens are read as plain text


class TokensPrompt(_Standing):
    """A prompt as token ids; nothing is added to them. `prompt` is what outputs show."""

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str]


# Token ids may be any sequence of integers, a NumPy array or a torch tensor among them.
Prompt: TypeAlias = str | Sequence[int] | TextPrompt | TokensPrompt | Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "…"}


class TokenizedPrompt(NamedTuple):
    """A prompt as the core takes it."""

    token_ids: list[int]
    text: str | None  # None where token ids came alone
    priority: int = 0  # the smaller is served first, where the policy is "priority"
    tenant: str = ""  # who asks: what the policy "fair" is fair to
    cache_salt: str = ""  # prefixes are shared among requests of one salt


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fields:
    """The keys that a mapping may have, checked."""

    prompt: str | None = option(None, high=MAX_PROMPT_CHARACTERS)
    prompt_token_ids: Sequence[TokenId] | None = option(None, high=MAX_PROMPT_TOKENS)
    priority: int = option(0, low=-MAX_PRIORITY, high=MAX_PRIORITY)
    tenant: str = option("", high=MAX_NAME)
    cache_salt: str | None = option(None, high=MAX_NAME)
    parse_special: bool = True

    def __post_init__(self) -> None:
        check_fields(self, error=RequestError)


def tokenize_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    *,
    parse_special: bool = True,
    truncate_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
) -> TokenizedPrompt:
    """The token ids of a prompt in any form. `parse_special`: parse special tokens that a text
    spells, unless its mapping says otherwise. `truncate_prompt_tokens`: keep that many last tokens.
    `max_tokens`: refuse a text before tokenizing it, if its length alone shows that it has more
    tokens.

    Raises RequestError, naming the key or the index, if the prompt is invalid.
    """
    fields = _fields(prompt, parse_special)
    if fields.prompt_token_ids is not None:
        token_ids = list(fields.prompt_token_ids)
    else:
        assert fields.prompt is not None  # checked by _fields
        if max_tokens is not None and truncate_prompt_tokens is None:
            tokenizer.check_length(fields.prompt, max_tokens)
        token_ids = _encode(tokenizer, fields.prompt, fields.parse_special)
    if truncate_prompt_tokens is not None:
        last = check_value(
            "truncate_prompt_tokens",
            truncate_prompt_tokens,
            Annotated[int, Bounds(low=1)],
            error=RequestError,
        )
        token_ids = token_ids[-last:]
    return TokenizedPrompt(
        token_ids, fields.prompt, fields.priority, fields.tenant, fields.cache_salt or ""
    )


def tokenize_prompts(
    tokenizer: Tokenizer,
    prompts: Prompt | Iterable[Prompt],
    *,
    parse_special: bool = True,
    truncate_prompt_tokens: int | None = None,
    max_tokens: int | None = None,
) -> list[TokenizedPrompt]:
    """One prompt, or any iterable of prompts, in order. Errors name the index: "prompts[2]: …"."""
    listed = list_prompts(prompts)
    tokenize = functools.partial(
        tokenize_prompt,
        tokenizer,
        parse_special=parse_special,
        truncate_prompt_tokens=truncate_prompt_tokens,
        max_tokens=max_tokens,
    )
    if len(listed) == 1:
        return [tokenize(listed[0])]
    tokenized = []
    for i, prompt in enumerate(listed):
        try:
            tokenized.append(tokenize(prompt))
        except PellucidError as error:
            raise type(error)(f"prompts[{i}]: {error}") from None
    return tokenized


def list_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
    """The prompts of a call in order, from any iterable; a single prompt becomes a list of one.

    A list that begins with an integer is one prompt of token ids. Raises RequestError, naming the
    index, if an entry is no prompt.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not _is_listed(prompts):
        raise RequestError(
            f"prompts is {show(prompts)}; it must be text, token ids, a mapping with 'prompt' or "
            "'prompt_token_ids', or an iterable of these"
        )
    entries: Any = prompts.tolist() if isinstance(prompts, np.ndarray) else prompts
    # An iterator may have no end: read one entry more than is allowed.
    iterator = iter(entries)
    first = list(itertools.islice(iterator, 1))
    are_ids = bool(first) and _is_integer(first[0])
    most = MAX_PROMPT_TOKENS if are_ids else MAX_PROMPTS
    listed = first + list(itertools.islice(iterator, most))
    if len(listed) > most:
        raise RequestError(f"prompts has more than {most} entries, which is the most for one call")
    if are_ids:
        return [listed]
    for i, prompt in enumerate(listed):
        _check_form(prompt, f"prompts[{i}]")
    return listed


def tokenize_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    max_tokens: int | None = None,
) -> TokenizedPrompt:
    """A conversation, rendered with the model's own chat template or with `chat_template`; the
    keywords are those of `Tokenizer.apply_chat_template`. `max_tokens`: as for `tokenize_prompt`.
    Raises RequestError if there is no template, or if it refuses the messages.
    """
    text = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        tools=tools,
        chat_template=chat_template,
        chat_template_kwargs=chat_template_kwargs,
        continue_final_message=continue_final_message,
    )
    if max_tokens is not None:
        tokenizer.check_length(text.plain, max_tokens)
    return TokenizedPrompt(
        tokenizer.encode(text, add_special=False, parse_special=True), text.plain
    )


def with_standing(
    prompt: TokenizedPrompt, priority: int, tenant: str, cache_salt: str
) -> TokenizedPrompt:
    """The prompt of a request that is treated so. Raises RequestError, naming the field."""
    fields = _Fields(priority=priority, tenant=tenant, cache_salt=cache_salt)
    return prompt._replace(
        priority=fields.priority, tenant=fields.tenant, cache_salt=fields.cache_salt or ""
    )


def list_conversations(messages: object) -> Sequence[Any]:
    """The conversations of a call: `messages` is one of them, or a list of several. Raises
    RequestError if it is no list.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError(
            f"messages is {show(messages)}; it must be a list of messages, or a list of such lists"
        )
    return [messages] if messages and isinstance(messages[0], Mapping) else messages


def with_priorities(
    prompts: Sequence[TokenizedPrompt], priority: int | Sequence[int] | None
) -> list[TokenizedPrompt]:
    """The prompts with the priorities of a call: one for all, or one for each. None: each prompt
    keeps its own. Raises RequestError if their number differs from that of the prompts.
    """
    if priority is None:
        return list(prompts)
    given: int | list[int] = check_value(
        "priority", priority, _Priority | Sequence[_Priority], error=RequestError
    )
    priorities = given if isinstance(given, list) else [given] * len(prompts)
    if len(priorities) != len(prompts):
        raise RequestError(
            f"priority has {len(priorities)} entries for {format_count(len(prompts), 'prompt')}; "
            "give one, or one for each"
        )
    return [
        prompt._replace(priority=value) for prompt, value in zip(prompts, priorities, strict=True)
    ]


def longest_prompt(
    max_model_len: int,
    params: SamplingParams | PoolingParams | Sequence[SamplingParams | PoolingParams] | None,
) -> int | None:
    """How many tokens a prompt may have; None if `params` truncate it anyway."""
    each = params if isinstance(params, Sequence) else [params]
    truncating = [p for p in each if isinstance(p, SamplingParams | PoolingParams)]
    cut = any(p.truncate_prompt_tokens is not None for p in truncating)
    return None if cut else max_model_len


def truncate_prompt(token_ids: list[int], params: SamplingParams, max_model_len: int) -> list[int]:
    """The last `params.truncate_prompt_tokens` of a prompt. -1: as many as leave room for
    `max_tokens` (for one token where that is None) in the context.
    """
    last = params.truncate_prompt_tokens
    if last is None:
        return token_ids
    if last == -1:
        last = max(1, max_model_len - (params.max_tokens or 1))
    return token_ids[-last:]


def check_prompt_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError, naming the index, for the first id that a vocabulary does not hold."""
    if not token_ids or (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        return
    i = next(i for i, token_id in enumerate(token_ids) if not 0 <= token_id < vocab_size)
    raise RequestError(
        f"prompt token id {show(token_ids[i])} is outside the vocabulary of {vocab_size}; it is "
        f"prompt_token_ids[{i}]"
    )


def _fields(prompt: Prompt, parse_special: bool) -> _Fields:
    """The checked fields of a prompt in any form. They have text, token ids or both."""
    _check_form(prompt, "a prompt")
    if isinstance(prompt, str):
        return _Fields(prompt=prompt, parse_special=parse_special)
    if not isinstance(prompt, Mapping):
        ids: Any = prompt.tolist() if isinstance(prompt, np.ndarray) else prompt
        return _Fields(prompt_token_ids=ids)
    if prompt.get("prompt_token_ids") is None and prompt.get("prompt") is None:
        raise RequestError(
            "a prompt that is a mapping needs 'prompt' or 'prompt_token_ids'; it has "
            f"{show(list(prompt))}"
        )
    known = _Fields.__dataclass_fields__
    for key in prompt:
        if key not in known:
            raise RequestError(unknown_name("key of a prompt", key, known))
    asked: dict[str, Any] = {"parse_special": parse_special, **prompt}
    if isinstance(asked.get("prompt_token_ids"), np.ndarray):
        asked["prompt_token_ids"] = asked["prompt_token_ids"].tolist()
    return _Fields(**asked)


def _check_form(prompt: object, name: str) -> None:
    """Raise RequestError if a value is neither text nor a list nor a mapping."""
    if not isinstance(prompt, str | Mapping) and not _is_listed(prompt):
        raise RequestError(
            f"{name} is {show(prompt)}; it must be text, token ids, or a mapping with 'prompt' or "
            "'prompt_token_ids'"
        )


def _is_listed(value: object) -> bool:
    """True for an iterable with an order: not a set, not bytes, not a zero-dimensional array."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    unordered = isinstance(value, bytes | bytearray | memoryview | set | frozenset)
    return isinstance(value, Iterable) and not unordered


def _is_integer(value: object) -> bool:
    try:
        operator.index(value)  # type: ignore[arg-type]
    except Exception:  # it has no integer, or a method of its own that fails
        return False
    return not isinstance(value, bool)


def _encode(tokenizer: Tokenizer, text: str, parse_special: bool) -> list[int]:
    """The ids of a text prompt, with one bos and no second one."""
    token_ids = tokenizer.encode(text, parse_special=parse_special)
    bos = tokenizer.bos_token_id
    is_doubled = tokenizer.add_bos and parse_special and token_ids[:2] == [bos, bos]
    return token_ids[1:] if is_doubled else token_ids
