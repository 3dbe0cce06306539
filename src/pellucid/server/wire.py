"""JSON as it goes over the wire."""

import json
from typing import Any

__all__ = ["compact"]


_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def compact(data: Any) -> bytes:
    """UTF-8 without spaces. Text that holds lone surrogates is escaped."""
    text = _encode(data)
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(data, separators=(",", ":")).encode()
