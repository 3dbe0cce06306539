"""What the native kernels cannot compute is refused where the model is opened, with the field and
the limit; what they can is not.
"""

import dataclasses
from typing import Any

import pytest

from pellucid.backends.native.backend import NativeBackend
from pellucid.config import ModelConfig
from pellucid.errors import ConfigError, UnsupportedError
from pellucid.kv_spec import KVSpec

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=32,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=128,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 2048}, "llama: head_dim is 2048; the native backend computes at most 1024"),
        ({"num_kv_heads": 1 << 17, "num_heads": 1 << 17}, "num_kv_heads is 131072; .* most 65536"),
        ({"num_heads": 1 << 23, "head_dim": 1024}, r"num_heads · head_dim is 8589934592; "),
    ],
)
def test_a_size_that_no_kernel_computes_is_refused_by_its_field(
    change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        NativeBackend(threads=1).check_model(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"head_dim": 1024},
        {"head_dim": 7},
        {"intermediate_size": 1 << 24, "vocab_size": 1 << 24, "hidden_size": 1 << 24},
        {"num_heads": 1 << 16, "num_kv_heads": 1 << 16},
    ],
)
def test_sizes_within_the_limits_are_taken(change: dict[str, Any]) -> None:
    NativeBackend(threads=1).check_model(dataclasses.replace(CONFIG, **change))


def test_a_cache_of_more_tokens_than_slots_is_refused() -> None:
    with pytest.raises(ConfigError, match="at most 2147483647 tokens"):
        NativeBackend(threads=1).new_kv_store(1 << 27, 16, KVSpec(1, 1, 1, "f16", "f16"))
