"""JSON as it goes over the wire."""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

__all__ = ["compact"]


def compact(data: Any) -> bytes:
    """UTF-8 without spaces. Text that holds lone surrogates is escaped."""
    try:
        return to_json(data)
    except PydanticSerializationError:
        return json.dumps(data, separators=(",", ":")).encode()
