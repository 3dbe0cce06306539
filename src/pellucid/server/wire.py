"""JSON as it goes over the wire."""

import json
from typing import Any

__all__ = ["compact"]


def compact(data: Any) -> bytes:
    """UTF-8 without spaces. Text that holds lone surrogates is escaped."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode(
        errors="surrogatepass"
    )
