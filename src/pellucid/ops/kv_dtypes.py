"""Names of KV cache dtypes: how a user chooses them, and which heads they support.

Keys and values may differ: "int8,int4" is int8 for keys and int4 for values.
`backends/reference/kv_dtypes.py` defines how each of them rounds.
"""

from collections.abc import Sequence

from ..errors import ConfigError

__all__ = ["KV_GROUP", "check_kv_dtype", "choose_kv_dtypes"]

KV_GROUP = 32  # dimensions that share a scale in int4


def choose_kv_dtypes(
    asked: str, allowed: Sequence[str], *, field: str = "kv_cache_dtype"
) -> tuple[str, str]:
    """The dtypes of keys and of values. `asked` is one name for both, or two names with a comma
    between them; "auto" is the first allowed dtype. `field` is its name in an error.
    """
    names = [name.strip() for name in asked.split(",")]
    if len(names) > 2 or any(name not in (*allowed, "auto") for name in names):
        raise ConfigError(
            f"{field} is {asked!r}; it must be auto, {', '.join(allowed)}, or two of them, "
            "for keys and values: K,V"
        )
    k, v = (allowed[0] if name == "auto" else name for name in (names[0], names[-1]))
    return k, v


def check_kv_dtype(dtype: str, allowed: Sequence[str], head_dim: int) -> None:
    """Raise ConfigError if a backend has no such cache, or if it cannot hold heads of that size."""
    if dtype not in allowed:
        raise ConfigError(f"a KV cache dtype is {dtype!r}; it must be one of: {', '.join(allowed)}")
    if dtype == "int4" and head_dim % KV_GROUP:
        raise ConfigError(
            f"a KV cache of int4 needs a head_dim that is a multiple of {KV_GROUP}; this model's "
            f"is {head_dim}"
        )
