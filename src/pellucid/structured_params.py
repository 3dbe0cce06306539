"""`StructuredOutputsParams`: the constraint on an answer's text, as plain data. `structured/`
compiles it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from .checks import Bounds, check_fields, option, show
from .errors import ConfigError
from .named_fields import check_names, named_fields

__all__ = ["StructuredOutputsParams", "check_schema_depth"]

MAX_GRAMMAR = 1 << 16  # characters of a schema, a regex or a grammar
MAX_SCHEMA_DEPTH = 64
MAX_CHOICES = 1024
MAX_CHOICE = 1024  # characters


@named_fields("field of structured_outputs")
@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """The constraint on an answer's text; exactly one field is set. The names are vLLM's.

    An answer that ends by itself is valid. One that reaches max_tokens before it is complete has
    the finish_reason "length".
    """

    json: str | Mapping[str, object] | bool | None = option(
        None, help="A JSON Schema, as a mapping or as text"
    )
    regex: str | None = option(
        None, low=1, high=MAX_GRAMMAR, help="A regular expression for the whole text"
    )
    choice: Sequence[Annotated[str, Bounds(low=1, high=MAX_CHOICE)]] | None = option(
        None, low=1, high=MAX_CHOICES, help="The text is one of these"
    )
    grammar: str | None = option(
        None, low=1, high=MAX_GRAMMAR, help="A grammar in GBNF, as llama.cpp's, or in Lark"
    )
    json_object: bool = option(False, help="Any JSON object")

    def __post_init__(self) -> None:
        check_fields(self, prefix="structured_outputs.")
        given = [name for name in self.__dataclass_fields__ if self._is_set(name)]
        if len(given) != 1:
            names = " and ".join(given) or "nothing"
            raise ConfigError(
                f"structured_outputs has {names}; exactly one of "
                f"{', '.join(self.__dataclass_fields__)} must be set"
            )
        if self._is_set("json"):
            object.__setattr__(self, "json", _schema_text(self.json))

    def _is_set(self, name: str) -> bool:
        return getattr(self, name) is not (False if name == "json_object" else None)

    def kind_and_text(self) -> tuple[str, str]:
        """The field that is set, and its text: the schema and the choices as JSON."""
        if self.json_object:
            return "json_object", '{"type":"object"}'
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        kind = next(name for name in ("json", "regex", "grammar") if getattr(self, name))
        return kind, getattr(self, kind)

    @classmethod
    def from_optional(cls, **fields: Any) -> "StructuredOutputsParams":
        """Build from fields of JSON: null means the default."""
        check_names(cls, fields)
        return cls(**{name: value for name, value in fields.items() if value is not None})

    @classmethod
    def from_response_format(cls, value: object) -> "StructuredOutputsParams | None":
        """The constraint of OpenAI's `response_format`; None for plain text."""
        if not isinstance(value, Mapping):
            raise ConfigError(f"response_format is {show(value)}; it must be an object with a type")
        kind = value.get("type")
        if kind == "text":
            return None
        if kind == "json_object":
            return cls(json_object=True)
        if kind == "json_schema":
            given = value.get("json_schema")
            schema = given.get("schema") if isinstance(given, Mapping) else None
            if schema is None:
                raise ConfigError("response_format.json_schema has no schema")
            return cls(json=schema)
        raise ConfigError(
            f"response_format.type is {show(kind)}; it must be one of: text, json_object, "
            "json_schema"
        )


def _schema_text(schema: object) -> str:
    """A JSON Schema as text, checked for its length and depth."""
    if isinstance(schema, str):
        _check_schema_length(schema)
        try:
            schema = json.loads(schema, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"structured_outputs.json is not JSON: {str(error)[:100]}") from None
    check_schema_depth(schema)
    try:
        text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"structured_outputs.json is not JSON: {str(error)[:100]}") from None
    _check_schema_length(text)
    return text


def _check_schema_length(text: str) -> None:
    if len(text) > MAX_GRAMMAR:
        raise ConfigError(
            f"structured_outputs.json has {len(text)} characters; it must have at most "
            f"{MAX_GRAMMAR}"
        )


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def check_schema_depth(
    schema: object, most: int = MAX_SCHEMA_DEPTH, name: str = "structured_outputs.json"
) -> None:
    """Raise ConfigError for a schema that is nested more than `most` levels deep, or that contains
    itself. `name` is the field that has it.
    """
    level, depth = [schema], 0
    while level:
        depth += 1
        if depth > most:
            raise ConfigError(f"{name} is nested more than {most} levels deep")
        below: list[object] = []
        for value in level:
            if isinstance(value, Mapping):
                below += value.values()
            elif isinstance(value, list | tuple):
                below += value
            if len(below) > MAX_GRAMMAR:
                raise ConfigError(f"{name} has more than {MAX_GRAMMAR} values at one level")
        level = below
