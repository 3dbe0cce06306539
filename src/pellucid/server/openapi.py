"""The OpenAPI description, with the bodies that routes read themselves, and a page that shows it
without loading anything from elsewhere.
"""

import html
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from fastapi.routing import APIRoute
from pydantic.json_schema import models_json_schema

__all__ = ["describe"]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em;"
    "color-scheme:light dark}pre{overflow:auto;padding:.8em;background:#8882;border-radius:6px}"
    "code{font-size:.9em}summary{cursor:pointer}"
)


def describe(app: FastAPI) -> None:
    """Add /openapi.json with all bodies, and /docs."""
    models = {
        route.path: route.openapi_extra.pop("body")
        for route in app.routes
        if isinstance(route, APIRoute) and route.openapi_extra and "body" in route.openapi_extra
    }

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            refs, definitions = models_json_schema(
                [(model, "validation") for model in models.values()],
                ref_template="#/components/schemas/{model}",
            )
            components = schema.setdefault("components", {}).setdefault("schemas", {})
            components |= definitions.get("$defs", {})
            for path, model in models.items():
                post = schema["paths"][path]["post"]
                content = {"application/json": {"schema": refs[model, "validation"]}}
                post["requestBody"] = {"required": True, "content": content}
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(_page(app.openapi()))


def _page(schema: dict[str, Any]) -> str:
    """The description as one plain page."""
    parts = [f"<!doctype html><title>{schema['info']['title']} API</title>"]
    parts.append(f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style>")
    parts.append(f"<h1>{schema['info']['title']} {schema['info']['version']}</h1>")
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            text = html.escape(operation.get("description") or operation.get("summary") or "")
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{text}</p>")
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                name = content["schema"]["$ref"].rpartition("/")[2]
                fields = schema["components"]["schemas"][name]["properties"]
                required = schema["components"]["schemas"][name].get("required", [])
                rows = "".join(
                    f"<li><code>{html.escape(field)}</code>: {html.escape(_type(kind))}"
                    f"{' (required)' if field in required else ''}</li>"
                    for field, kind in fields.items()
                )
                parts.append(
                    f"<details><summary>Fields of the body</summary><ul>{rows}</ul></details>"
                )
    parts.append("<p>As data: <a href=openapi.json>openapi.json</a></p>")
    return "\n".join(parts)


def _type(kind: dict[str, Any]) -> str:
    """A field's type in words."""
    if "$ref" in kind:
        return str(kind["$ref"].rpartition("/")[2])
    if "anyOf" in kind:
        return " or ".join(_type(k) for k in kind["anyOf"] if k.get("type") != "null")
    if "enum" in kind:
        return ", ".join(map(str, kind["enum"]))
    if kind.get("type") == "array":
        return f"list of {_type(kind.get('items', {}))}"
    return str(kind.get("type", "any"))
