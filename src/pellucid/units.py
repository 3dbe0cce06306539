"""Sizes in bytes and counts as text."""

__all__ = ["format_bytes", "format_count"]


def format_bytes(num_bytes: float) -> str:
    """With decimal units: 98362432 -> "98.4 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{1 if num_bytes < 100 * scale else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def format_count(count: int, noun: str) -> str:
    """A number and its noun, in the plural unless it is one: "1 request", "2 requests"."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
