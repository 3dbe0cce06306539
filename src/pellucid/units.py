"""Sizes in bytes as text."""

__all__ = ["format_bytes"]


def format_bytes(num_bytes: float) -> str:
    """With decimal units: 98362432 -> "98.4 MB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.{1 if num_bytes < 100 * scale else 0}f} {unit}"
    return f"{num_bytes:.0f} B"
