"""How many lists and objects a body may hold, counted before it is parsed.

Parsing and checking hold the event loop, and a container of two bytes costs a hundred times as much
as two bytes of text. Brackets within strings do not count.
"""

import asyncio
import itertools

from .errors import ApiError

__all__ = ["MAX_CONTAINERS", "check_containers"]

MAX_CONTAINERS = 1 << 17
_PIECE = 1 << 18  # bytes that are counted before others have their turn
_OTHERS = bytes(set(range(256)) - set(b'"[{'))


async def check_containers(body: bytes) -> None:
    """Raise ApiError 400 for a JSON text with more than MAX_CONTAINERS lists and objects."""
    if body.count(b"[") + body.count(b"{") <= MAX_CONTAINERS:
        return
    # Without escapes, each quote begins or ends a string.
    marks = body.replace(b"\\\\", b"").replace(b'\\"', b"").translate(None, _OTHERS)
    count, is_inside = 0, False
    for start in range(0, len(marks), _PIECE):
        parts = marks[start : start + _PIECE].split(b'"')
        count += sum(map(len, itertools.islice(parts, int(is_inside), None, 2)))
        if count > MAX_CONTAINERS:
            raise ApiError(
                400,
                f"the body holds more than {MAX_CONTAINERS} lists and objects, which is the most",
            )
        is_inside ^= len(parts) % 2 == 0
        await asyncio.sleep(0)
