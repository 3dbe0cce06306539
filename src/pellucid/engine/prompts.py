"""What a caller may pass as a prompt or as a conversation, and the token ids that it becomes. `LLM` and `AsyncEngine` share it.

One idea: special tokens are the engine's to add and the template's to write. Plain text is read as text, whatever it spells; text that the
model's own chat template rendered holds special tokens, the first of the sequence among them, so they are read as such and none is added.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..errors import RequestError
from ..tokenizer import Tokenizer

__all__ = ["Message", "Prompt", "TokenizedPrompt", "tokenize_chat", "tokenize_prompt"]

Prompt: TypeAlias = str | Sequence[int] | Mapping[str, Any]  # text, token ids, {"prompt": text} or {"prompt_token_ids": ids}
Message: TypeAlias = Mapping[str, Any]  # {"role": "user", "content": "…"}


class TokenizedPrompt(NamedTuple):
    """A prompt as the core takes it."""

    token_ids: list[int]
    text: str | None  # None where token ids came alone


def tokenize_prompt(tokenizer: Tokenizer, prompt: Prompt) -> TokenizedPrompt:
    """Any form of a prompt. Raises RequestError where a mapping has neither form of it."""
    if isinstance(prompt, str):
        return TokenizedPrompt(tokenizer.encode(prompt), prompt)
    if isinstance(prompt, Mapping):
        if "prompt_token_ids" in prompt:
            return TokenizedPrompt(list(prompt["prompt_token_ids"]), prompt.get("prompt"))
        if isinstance(prompt.get("prompt"), str):
            return TokenizedPrompt(tokenizer.encode(prompt["prompt"]), prompt["prompt"])
        raise RequestError(f"a prompt that is a mapping needs 'prompt' or 'prompt_token_ids'; it has {sorted(map(str, prompt))}")
    return TokenizedPrompt(list(prompt), None)


def tokenize_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> TokenizedPrompt:
    """A conversation, rendered with the model's own chat template. Raises RequestError where there is none, or it refuses the messages."""
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    return TokenizedPrompt(tokenizer.encode(text, add_special=False, parse_special=True), text)
