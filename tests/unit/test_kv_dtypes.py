"""What a KV cache keeps: how its dtypes are asked for, what they take, and what they round to."""

import numpy as np
import pytest

from pellucid.backends.reference.kv_dtypes import rotate, round_trip
from pellucid.backends.registry import BACKENDS, get_backend
from pellucid.errors import ConfigError
from pellucid.kv_spec import KVSpec
from pellucid.ops.kv_dtypes import choose_kv_dtypes


def test_auto_is_the_first_and_two_names_are_of_keys_and_of_values() -> None:
    allowed = ("f16", "f32", "int8")
    assert choose_kv_dtypes("auto", allowed) == ("f16", "f16")
    assert choose_kv_dtypes("int8", allowed) == ("int8", "int8")
    assert choose_kv_dtypes("f32, int8", allowed) == ("f32", "int8")
    for wrong in ("int3", "int8,int8,int8", "", "f16,"):
        with pytest.raises(ConfigError, match=r"kv_cache_dtype is .* auto, f16, f32, int8"):
            choose_kv_dtypes(wrong, allowed)


@pytest.mark.parametrize("name", BACKENDS)
def test_heads_that_are_no_whole_number_of_groups_are_refused_in_int4(name: str) -> None:
    with pytest.raises(ConfigError, match="multiple of 32; this model's is 20"):
        get_backend(name).kv_token_bytes(KVSpec(2, 20, 20, "int8", "int4"))
    with pytest.raises(ConfigError, match="'int2'; it must be one of"):
        get_backend(name).new_kv_store(1, 16, KVSpec(2, 32, 32, "int2", "f32"))


@pytest.mark.parametrize(
    ("dtypes", "size"), [(("f32", "f16"), 384), (("int8", "int8"), 132), (("int8", "int4"), 102)]
)
def test_a_native_store_takes_the_bytes_that_the_plan_says(
    dtypes: tuple[str, str], size: int
) -> None:
    backend = get_backend("native")
    spec = KVSpec(3, 64, 64, *dtypes)
    assert backend.kv_token_bytes(spec) == 3 * size
    saved = backend.save_blocks(backend.new_kv_store(5, 32, spec), range(5))
    assert saved.nbytes == 5 * 32 * 3 * size


def test_rotation_keeps_products_and_is_its_own_inverse() -> None:
    rng = np.random.default_rng(0)
    q, k = (rng.normal(size=(5, 96)).astype(np.float32) for _ in range(2))
    np.testing.assert_allclose(rotate(rotate(k)), k, atol=1e-6)
    np.testing.assert_allclose((rotate(q) * rotate(k)).sum(-1), (q * k).sum(-1), atol=1e-5)


def test_rounding_is_within_half_a_step_and_rotation_saves_keys_with_one_large_dimension() -> None:
    x = np.random.default_rng(1).normal(size=(40, 2, 64)).astype(np.float32)
    assert np.array_equal(round_trip(x, "f32", keys=True), x)
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(round_trip(x, "int8", keys=True) - x) <= step * 0.51).all()
    assert (
        not round_trip(np.zeros_like(x), "int4", keys=True).any()
        and not round_trip(np.zeros_like(x), "int8", keys=False).any()
    )
    x[..., 3] *= 50
    plain, rotated = (
        np.square(round_trip(x, "int4", keys=keys) - x).mean() for keys in (False, True)
    )
    assert rotated < plain
