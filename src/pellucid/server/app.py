"""The app: its routes, and what stands around them."""

import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from .. import __version__
from ..engine.async_engine import AsyncEngine
from .chat import chat
from .completions import complete
from .embeddings import embed
from .errors import ApiError, add_handlers, as_api_error
from .guard import Guard
from .json_bounds import check_containers
from .messages import count_tokens, message
from .openapi import describe
from .page import PAGE_PATHS, add_page
from .protocol import (
    ChatRequest,
    CompletionRequest,
    CountTokensRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    MessagesRequest,
    ResponsesRequest,
    TokenizeRequest,
    client_names,
)
from .responses import respond
from .service import Service
from .settings import ServerSettings
from .tokens import detokenize, tokenize

__all__ = ["create_app"]

_Body = TypeVar("_Body", bound=BaseModel)


def create_app(engine: AsyncEngine, name: str, settings: ServerSettings) -> FastAPI:
    """An ASGI app that serves `engine` under the model's `name`. `app.state.service` is what its
    routes share.
    """
    service = Service(engine, name, settings)
    app = FastAPI(
        title="Pellucid",
        version=__version__,
        root_path=settings.root_path,
        docs_url=None,  # FastAPI's page loads its scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    add_handlers(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_health(app, service)
    add_page(app, service)
    describe(app)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allowed_origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    app.add_middleware(Guard, service=service, open_paths=PAGE_PATHS)
    return app


def _add_generation(app: FastAPI, service: Service) -> None:
    """Routes that run the model."""

    def route(
        path: str, model: type[_Body], answer: Callable[[Service, _Body, str], Response]
    ) -> None:
        async def endpoint(request: Request) -> Response:
            body = await _read(request, model)
            try:
                return answer(service, body, request.state.key)
            except Exception as error:
                raise as_api_error(error, client_names(body)) from error

        endpoint.__doc__ = answer.__doc__
        app.add_api_route(
            path, endpoint, methods=["POST"], openapi_extra={"body": model}, response_model=None
        )

    route("/v1/chat/completions", ChatRequest, chat)
    route("/v1/completions", CompletionRequest, complete)
    route("/v1/embeddings", EmbeddingRequest, embed)
    route("/v1/responses", ResponsesRequest, respond)
    route("/v1/messages", MessagesRequest, message)

    def route_json(
        path: str, model: type[_Body], answer: Callable[[Service, _Body], Awaitable[Any]]
    ) -> None:
        async def endpoint(request: Request) -> Response:
            body = await _read(request, model)
            try:
                with service.admitted(request.state.key):
                    return JSONResponse(await answer(service, body))
            except Exception as error:
                raise as_api_error(error, client_names(body)) from error

        app.add_api_route(
            path, endpoint, methods=["POST"], openapi_extra={"body": model}, response_model=None
        )

    route_json("/v1/messages/count_tokens", CountTokensRequest, count_tokens)
    route_json("/tokenize", TokenizeRequest, tokenize)
    route_json("/detokenize", DetokenizeRequest, detokenize)


async def _read(request: Request, model: type[_Body]) -> _Body:
    """The body, checked. Only JSON is taken: a page of another origin can send nothing else without
    asking first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"content-type is {kind[:60]!r}; it must be application/json")
    body = await request.body()
    await check_containers(body)
    return model.model_validate_json(body)


def _add_models(app: FastAPI, service: Service) -> None:
    def card() -> dict[str, Any]:
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "pellucid",
            "root": str(service.engine.path),
            "max_model_len": service.engine.max_model_len,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The model that is served."""
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """One model."""
        service.check_model(name)
        return card()

    @app.get("/version")
    async def version() -> dict[str, str]:
        """The server's version."""
        return {"version": __version__}


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> Response:
        """200 while the engine can serve."""
        if service.engine.is_dead:
            raise ApiError(503, "the engine has ended", code="engine_dead")
        return JSONResponse({"status": "ok"})

    @app.get("/ready")
    async def ready() -> Response:
        """200 while new requests are taken; 503 while the server drains."""
        if service.is_draining or service.engine.is_dead:
            raise ApiError(503, "no new requests are taken", code="draining")
        return JSONResponse({"status": "ready"})

    @app.get("/metrics")
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        text = await service.metrics.text()
        return PlainTextResponse(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/debug/requests")
    async def requests() -> dict[str, Any]:
        """What runs now, and what waits and why."""
        requests = await service.engine.requests()
        return {"time": time.time(), "requests": [asdict(request) for request in requests]}
