"""What a caller may pass as a prompt or as a conversation, and the token ids that it becomes. `LLM`
and `AsyncEngine` share it.

One idea: special tokens are the engine's to add and the template's to write. Plain text is read as
text, whatever it spells; text that the model's own chat template rendered holds special tokens, the
first of the sequence among them, so those that the template wrote are read as such and none is
added. What a message spells is text there too.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..errors import RequestError
from ..tokenizer import Tokenizer

__all__ = ["Message", "Prompt", "TokenizedPrompt", "tokenize_chat", "tokenize_prompt"]

MAX_PRIORITY = 1 << 31
MAX_NAME = 256  # characters of a tenant or a salt

# Text, token ids, or {"prompt": text} or {"prompt_token_ids": ids}, which may have "priority",
# "tenant" and "cache_salt" beside it.
Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]
Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "…"}


class TokenizedPrompt(NamedTuple):
    """A prompt as the core takes it."""

    token_ids: list[int]
    text: str | None  # None where token ids came alone
    priority: int = 0  # the smaller is served first, where the policy is "priority"
    tenant: str = ""  # who asks: what the policy "fair" is fair to
    cache_salt: str = ""  # prefixes are shared among requests of one salt


def tokenize_prompt(tokenizer: Tokenizer, prompt: Prompt) -> TokenizedPrompt:
    """Any form of a prompt. Raises RequestError where a mapping has neither form of it."""
    if isinstance(prompt, str):
        return TokenizedPrompt(tokenizer.encode(prompt), prompt)
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return TokenizedPrompt(
                list(prompt["prompt_token_ids"]), prompt.get("prompt"), **_standing(prompt)
            )
        if isinstance(prompt.get("prompt"), str):
            return TokenizedPrompt(
                tokenizer.encode(prompt["prompt"]), prompt["prompt"], **_standing(prompt)
            )
        raise RequestError(
            "a prompt that is a mapping needs 'prompt' or 'prompt_token_ids'; it has "
            f"{sorted(map(str, prompt))}"
        )
    return TokenizedPrompt(list(prompt), None)


def _standing(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """What a mapping says about how its request is treated among others."""
    standing = {
        name: prompt[name] for name in ("priority", "tenant", "cache_salt") if name in prompt
    }
    for name, value in standing.items():
        if name == "priority":
            if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_PRIORITY:
                raise RequestError(
                    f"priority is {reprlib.repr(value)}; it must be an integer from "
                    f"{-MAX_PRIORITY} to {MAX_PRIORITY}"
                )
        elif not isinstance(value, str) or len(value) > MAX_NAME:
            raise RequestError(
                f"{name} is {reprlib.repr(value)}; it must be a string of at most {MAX_NAME} "
                "characters"
            )
    return standing


def tokenize_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> TokenizedPrompt:
    """A conversation, rendered with the model's own chat template. Raises RequestError where there
    is none, or it refuses the messages.
    """
    text = tokenizer.apply_chat_template(
        messages, add_generation_prompt=add_generation_prompt, tools=tools
    )
    return TokenizedPrompt(
        tokenizer.encode(text, add_special=False, parse_special=True), text.plain
    )
