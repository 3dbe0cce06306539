"""POST /tokenize and /detokenize, as vLLM has them."""

import asyncio
from typing import Any

from ..engine.prompts import tokenize_chat, tokenize_prompt
from .errors import ApiError
from .protocol import DetokenizeRequest, TokenizeRequest
from .service import Service

__all__ = ["detokenize", "tokenize"]


async def tokenize(service: Service, body: TokenizeRequest) -> dict[str, Any]:
    """The token ids of a text or of a chat."""
    service.check_model(body.model)
    _check_size(service, "prompt", len(body.prompt or ""), "characters")
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "exactly one of prompt and messages must be given", param="prompt")
    tokenizer, most = service.engine.tokenizer, service.engine.max_model_len

    def encode() -> list[int]:
        if body.messages is not None:
            return tokenize_chat(
                tokenizer,
                body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt is not False,
                chat_template_kwargs=body.chat_template_kwargs,
            ).token_ids
        assert body.prompt is not None
        if body.add_special_tokens is False:
            return tokenizer.encode(body.prompt, add_special=False, parse_special=True)
        return tokenize_prompt(tokenizer, body.prompt).token_ids

    token_ids = await asyncio.to_thread(encode)
    answer: dict[str, Any] = {"count": len(token_ids), "max_model_len": most, "tokens": token_ids}
    if body.return_token_strs:
        answer["token_strs"] = [tokenizer.token_text(token_id) for token_id in token_ids]
    return answer


async def detokenize(service: Service, body: DetokenizeRequest) -> dict[str, Any]:
    """The text of token ids."""
    service.check_model(body.model)
    _check_size(service, "tokens", len(body.tokens), "entries")
    tokenizer = service.engine.tokenizer
    wrong = next((t for t in body.tokens if not 0 <= t < tokenizer.vocab_size), None)
    if wrong is not None:
        raise ApiError(
            400,
            f"tokens holds {wrong}; it must be between 0 and {tokenizer.vocab_size - 1}",
            param="tokens",
        )
    return {"prompt": await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special=False)}


def _check_size(service: Service, name: str, count: int, unit: str) -> None:
    most = service.settings.max_tokenized
    if count > most:
        message = f"{name} has {count} {unit}; this server allows at most {most}"
        raise ApiError(400, message, param=name)
