"""Every failure as OpenAI's error body: `{"error": {"message", "type", "param", "code"}}`; on
Anthropic's routes as theirs: `{"type": "error", "error": {"type", "message"}}`.
"""

import logging
import re
from collections.abc import Collection, Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Scope

from ..checks import show
from ..errors import EngineError, PellucidError, PromptTooLongError, QueueFullError

__all__ = [
    "ApiError",
    "add_handlers",
    "anthropic_error_body",
    "as_api_error",
    "error_body",
    "route_path",
]

_NO_FIELDS: Mapping[str, str] = MappingProxyType({})
_log = logging.getLogger(__name__)

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}

_ANTHROPIC_TYPES = {403: "permission_error", 413: "request_too_large", 504: "timeout_error"}
_ANTHROPIC_PATH = "/v1/messages"

# how the engine's sentences about a prompt begin
_ABOUT_PROMPT = ("the prompt ", "prompt token id ", "prompt_token_ids", "prompts[")


class ApiError(Exception):
    """A failure with its status. `param` names the field of the request that is wrong."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after = retry_after  # seconds

    @property
    def headers(self) -> dict[str, str]:
        headers = {"retry-after": str(self.retry_after)} if self.retry_after is not None else {}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def error_body(error: ApiError, path: str = "") -> dict[str, Any]:
    """The body of an error on a route. `path` is the route's, without the root path."""
    if path.startswith(_ANTHROPIC_PATH):
        return anthropic_error_body(error)
    kind = _TYPES.get(error.status, "api_error" if error.status >= 500 else _TYPES[400])
    return {
        "error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    }


def anthropic_error_body(error: ApiError) -> dict[str, Any]:
    """Anthropic's body of an error."""
    kind = "api_error" if error.status >= 500 else _TYPES[400]
    kind = (_TYPES | _ANTHROPIC_TYPES).get(error.status, kind)
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def as_api_error(error: BaseException, fields: Mapping[str, str] = _NO_FIELDS) -> ApiError:
    """What a client is told of `error`. A message of ours begins with the name of the field that is
    wrong. If it is one of `fields`, the client's name for it takes its place and becomes `param`.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "the client left before its body was whole", code="client_left")
    if isinstance(error, ValidationError):
        return _of_validation(error)
    if isinstance(error, QueueFullError):
        return ApiError(503, str(error), code="queue_full", retry_after=1)
    if isinstance(error, EngineError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, PromptTooLongError):
        return _of_prompt(error, fields, "context_length_exceeded")
    if isinstance(error, PellucidError):
        if str(error).startswith(_ABOUT_PROMPT):
            return _of_prompt(error, fields)
        first = str(error).split(maxsplit=1)[0].partition("[")[0].rstrip(":")
        name = first.partition(".")[0]
        if name not in fields:
            return ApiError(400, str(error))
        if fields[name] == name:
            return ApiError(400, str(error), param=first)
        return ApiError(400, fields[name] + str(error)[len(first) :], param=fields[name])
    _log.error("a request failed by a fault of the server", exc_info=error)
    return ApiError(500, "the server failed; its log says why", code="internal_error")


def _of_prompt(error: PellucidError, fields: Collection[str], code: str | None = None) -> ApiError:
    """The engine's error about a prompt, with the name of the body's field that is the prompt."""
    field = next((name for name in ("prompt", "messages", "input") if name in fields), None)
    message = re.sub(r"^prompts\[", f"{field}[", str(error)) if field else str(error)
    return ApiError(400, message, param=field, code=code)


def _of_validation(error: ValidationError) -> ApiError:
    """The first mistake that pydantic found, in one sentence."""
    errors = error.errors(include_url=False, include_context=False)
    # of the alternatives of a union, the one that fits but for its length
    first = next((e for e in errors if e["type"] == "too_long"), errors[0])
    # names of the alternatives of a union stand between those of fields
    place = [str(p) for p in first["loc"] if isinstance(p, int) or p.isidentifier()]
    path = ".".join(p for p in place if p not in ("str", "int", "float", "bool"))
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first['msg'][:200]}", code="invalid_json")
    if first["type"] == "missing":
        return ApiError(400, f"{path} is missing", param=path, code="missing_required_parameter")
    reason = first["msg"].removeprefix("Value error, ")
    message = f"{path or 'the body'} is {show(first['input'])}: {reason[0].lower()}{reason[1:]}"
    return ApiError(400, message, param=path or None, code="invalid_value")


def route_path(scope: Scope) -> str:
    """The path of a request without the root path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def add_handlers(app: FastAPI) -> None:
    """Answer all failures of routes with our body."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        found = as_api_error(error)
        body = error_body(found, route_path(request.scope))
        return JSONResponse(body, found.status, headers=found.headers)

    async def answer_http(request: Request, error: HTTPException) -> JSONResponse:
        message = HTTPStatus(error.status_code).phrase.lower()
        headers: Mapping[str, str] = error.headers or {}
        found = ApiError(error.status_code, message, code=message.replace(" ", "_"))
        body = error_body(found, route_path(request.scope))
        return JSONResponse(body, found.status, headers=dict(headers))

    app.add_exception_handler(ApiError, answer)
    app.add_exception_handler(ValidationError, answer)
    app.add_exception_handler(PellucidError, answer)
    app.add_exception_handler(HTTPException, answer_http)  # type: ignore[arg-type]
    app.add_exception_handler(Exception, answer)
