"""POST /v1/embeddings: a vector for each input.

The inputs of a body are submitted together and run in the steps of other requests. A client that
leaves cancels them. The body is made in a thread: thousands of vectors are megabytes of JSON.
"""

import asyncio
import base64
import sys
import uuid
from array import array
from typing import Any

from starlette.responses import JSONResponse, Response

from ..outputs import PooledOutput, RequestOutput
from ..pooling_params import PoolingParams
from .errors import ApiError
from .generation import Job
from .protocol import EmbeddingRequest, client_names
from .service import Service, tenant_of
from .streaming import GeneratedResponse

__all__ = ["embed"]


def embed(service: Service, body: EmbeddingRequest, key: str) -> Response:
    """The response to a checked body. Raises ApiError or PellucidError where it is refused."""
    service.check_model(body.model)
    inputs = _inputs(body, service.settings.max_embedding_inputs)
    fields = ("pooling", "normalize", "dimensions", "truncate_prompt_tokens")
    given = {name: getattr(body, name) for name in fields}
    params = PoolingParams(**{name: value for name, value in given.items() if value is not None})
    tenant = tenant_of(key)
    standing: dict[str, Any] = {"tenant": tenant, "cache_salt": body.cache_salt or tenant}
    if body.priority is not None:
        standing["priority"] = body.priority
    outputs = service.engine.embed(
        [
            ({"prompt": i} if isinstance(i, str) else {"prompt_token_ids": i}) | standing
            for i in inputs
        ],
        params,
    )
    job = Job(
        id=f"embd-{uuid.uuid4().hex}",
        outputs=outputs,
        n=1,
        is_stream=False,
        includes_usage=False,
        includes_explanation=False,
        key=key,
        body_fields=client_names(body),
    )
    renderer = _Renderer(service.name, job, is_base64=body.encoding_format == "base64")
    return _EmbeddingResponse(service, job, renderer)


def _inputs(body: EmbeddingRequest, most: int) -> list[str] | list[list[int]]:
    """The inputs as a list; ApiError where there are none, or too many."""
    inputs: Any = body.input
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        inputs = [inputs]
    if not inputs or not all(inputs):
        raise ApiError(400, "input is empty; it must hold text or token ids", param="input")
    if len(inputs) > most:
        message = f"input has {len(inputs)} entries; this server allows at most {most}"
        raise ApiError(400, message, param="input")
    found: list[str] | list[list[int]] = inputs
    return found


class _EmbeddingResponse(GeneratedResponse):
    """Makes its body in a thread."""

    async def _respond_whole(self, outputs: list[RequestOutput]) -> Response:
        return await asyncio.to_thread(lambda: JSONResponse(self._renderer.whole(outputs)))


class _Renderer:
    """The body of an answer, which is never streamed."""

    def __init__(self, model: str, job: Job, *, is_base64: bool) -> None:
        self._model = model
        self._job = job
        self._is_base64 = is_base64

    def begin(self) -> bytes:
        return b""

    def push(self, place: int, output: RequestOutput) -> bytes:
        return b""

    def end(self, outputs: list[RequestOutput]) -> bytes:
        return b""

    def whole(self, outputs: list[RequestOutput]) -> dict[str, Any]:
        num_tokens = sum(len(output.prompt_token_ids) for output in outputs)
        num_cached = sum(output.num_cached_tokens for output in outputs)
        return {
            "id": self._job.id,
            "object": "list",
            "created": self._job.created,
            "model": self._model,
            "data": [
                {"object": "embedding", "index": i, "embedding": self._vector(output)}
                for i, output in enumerate(outputs)
            ],
            "usage": {
                "prompt_tokens": num_tokens,
                "total_tokens": num_tokens,
                "prompt_tokens_details": {"cached_tokens": num_cached},
            },
        }

    def _vector(self, output: RequestOutput) -> list[float] | str:
        """Numbers, or their float32 in little-endian order as base64, as OpenAI's client asks."""
        if not isinstance(output, PooledOutput) or output.embedding is None:
            raise ApiError(500, "an embedding was aborted", code="generation_failed")
        if not self._is_base64:
            return output.embedding
        numbers = array("f", output.embedding)
        if sys.byteorder == "big":
            numbers.byteswap()
        return base64.b64encode(numbers.tobytes()).decode()
