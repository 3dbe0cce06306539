"""What the routes of other APIs share: they become a chat request, and errors become theirs.

An API's message is a list of parts, each with a type. Its tool is a function with a schema. Errors
of the chat request name its fields, so they are given the names that the client knows.
"""

from collections.abc import Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from ..errors import QueueFullError
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from .conversation import AnswerForm, start_chat
from .errors import ApiError, as_api_error
from .generation import Outputs
from .protocol import ChatRequest, client_names
from .service import Service

__all__ = [
    "Json",
    "field_of",
    "function_tool",
    "join_text",
    "refuse_type",
    "renamed_errors",
    "start_translated",
    "usage_of",
]

Json = Mapping[str, Any]


def start_translated(
    service: Service, body: ChatRequest, key: str, names: Mapping[str, str]
) -> tuple[Outputs, SamplingParams, AnswerForm]:
    """`start_chat`; its errors name a field by `names`: the chat request's name -> the client's."""
    with renamed_errors(body, names):
        stream, params, form = start_chat(service, body, key)
    return _with_renamed_errors(stream, body, names), params, form


async def _with_renamed_errors(
    stream: Outputs, body: ChatRequest, names: Mapping[str, str]
) -> Outputs:
    with renamed_errors(body, names):
        async with aclosing(stream):
            async for output in stream:
                yield output


@contextmanager
def renamed_errors(body: ChatRequest, names: Mapping[str, str]) -> Iterator[None]:
    """Errors within the block name a field of `body` by `names`."""
    try:
        yield
    except QueueFullError:
        raise
    except Exception as error:
        raise _renamed(as_api_error(error, client_names(body)), names) from error


def _renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The error in the client's words: its param, and the field that its message begins with."""
    # Their tools are functions themselves.
    if error.param is not None and error.param.startswith("tools["):
        error.param = error.param.replace("].function.", "].", 1)
        error.message = error.message.replace("].function.", "].", 1)
    longest_first = sorted(names, key=len, reverse=True)
    for name in longest_first:
        if error.param is not None and _begins_with_field(error.param, name):
            error.param = names[name] + error.param[len(name) :]
            break
    for name in longest_first:
        if _begins_with_field(error.message, name):
            error.message = names[name] + error.message[len(name) :]
            error.param = error.param or names[name]
            break
    return error


def _begins_with_field(text: str, name: str) -> bool:
    return text.startswith(name) and text[len(name) : len(name) + 1] in ("", " ", ".", "[", ":")


def field_of(part: Json, name: str, place: str, kind: type = str) -> Any:
    """A field that must be there. `place` says in an error where the part stands."""
    value = part.get(name)
    if not isinstance(value, kind):
        wanted = "text" if kind is str else "an object"
        raise ApiError(400, f"{place}.{name} must be {wanted}", param=f"{place}.{name}")
    return value


def join_text(content: object, place: str, kinds: Mapping[str, str]) -> str:
    """The text of a message's content: text, or a list of parts. `kinds`: the types of parts that
    are read, and the field that has each one's text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ApiError(400, f"{place} must be text or a list of parts", param=place)
    texts = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise refuse_type(f"{place}[{i}].type", kind, kinds)
        texts.append(field_of(part, kinds[kind], f"{place}[{i}]"))
    return "".join(texts)


def refuse_type(place: str, kind: object, allowed: Mapping[str, Any] | list[str]) -> ApiError:
    """The error for a type that is not served."""
    shown = repr(kind[:60]) if isinstance(kind, str) else "absent"
    return ApiError(
        400, f"{place} is {shown}; it must be one of: {', '.join(allowed)}", param=place
    )


def function_tool(tool: Json, place: str, schema: str) -> dict[str, Any]:
    """A tool of the chat request. `schema` is the field that has the schema of the arguments."""
    function = {"name": field_of(tool, "name", place)}
    if tool.get("description") is not None:
        function["description"] = field_of(tool, "description", place)
    parameters = tool.get(schema)
    if parameters is not None and not isinstance(parameters, Mapping):
        raise ApiError(400, f"{place}.{schema} must be a JSON Schema", param=f"{place}.{schema}")
    return {
        "type": "function",
        "function": function | {"parameters": parameters or {"type": "object", "properties": {}}},
    }


def usage_of(output: RequestOutput) -> tuple[int, int, int]:
    """Tokens of the prompt, those of them that the cache had, and tokens of the answer."""
    answer = sum(completion.num_tokens for completion in output.outputs)
    return len(output.prompt_token_ids), output.num_cached_tokens, answer
