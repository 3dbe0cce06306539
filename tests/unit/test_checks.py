"""Config classes check types and bounds from their declarations, and nothing else gets through."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid.checks import Bounds, check_fields, check_value, declarations, option, show
from pellucid.checks import unknown_name as unknown
from pellucid.engine_config import EngineConfig
from pellucid.errors import ConfigError, RequestError

Small = Annotated[int, Bounds(low=0, high=9)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    x: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    needed: int = option(low=1, high=8, help="how many")
    maybe: int | None = option(None, low=1)
    share: float = option(0.5, above=0, below=1)
    either: Annotated[int, Bounds(low=1)] | Annotated[float, Bounds(above=0, below=1)] = 1
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    name: str = option("x", low=1, high=4)
    ids: Sequence[Small] = option(default_factory=list, high=3)
    pair: tuple[int | None, ...] = ()
    bias: Mapping[Small, float] | None = option(None, high=2)
    inner: Inner | None = None

    def __post_init__(self) -> None:
        check_fields(self)


def build(**values: Any) -> Config:
    return Config(**{"needed": 1, **values})


class Broken(Fraction):
    """A number and list whose every method raises an error of its own."""

    def _raise(self, *_: object) -> NoReturn:
        raise RuntimeError("broken")

    __len__ = __iter__ = __index__ = __float__ = __contains__ = _raise

    def __repr__(self) -> str:
        return "<broken>"


class BrokenMapping(dict[int, float]):
    """A mapping whose entries cannot be had."""

    def items(self) -> NoReturn:
        raise RuntimeError("broken")


class BrokenList(list[int]):
    """A list whose entries cannot be had."""

    def __iter__(self) -> NoReturn:
        raise RuntimeError("broken")

    def __repr__(self) -> str:
        return "<broken>"


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"needed": 1.5}, "needed is 1.5; it must be an integer between 1 and 8"),
        ({"needed": "4"}, "needed is '4'; it must be an integer between 1 and 8"),
        ({"needed": True}, "needed is True; it must be an integer between 1 and 8"),
        ({"needed": np.True_}, "needed is np.True_; it must be an integer between 1 and 8"),
        ({"needed": 9}, "needed is 9; it must be an integer between 1 and 8"),
        ({"needed": None}, "needed is None; it must be an integer between 1 and 8"),
        (
            {"needed": 10**6000},
            "needed is an integer of 19932 bits; it must be an integer between 1 and 8",
        ),
        ({"maybe": 0}, "maybe is 0; it must be an integer of at least 1, or None"),
        ({"share": 1}, "share is 1; it must be a number above 0 and below 1"),
        ({"share": math.nan}, "share is nan; it must be a number above 0 and below 1"),
        ({"share": "0.5"}, "share is '0.5'; it must be a number above 0 and below 1"),
        (
            {"either": 1.0},
            "either is 1.0; it must be an integer of at least 1, or a number above 0 and below 1",
        ),
        ({"flag": "no"}, "flag is 'no'; it must be True or False"),
        ({"flag": 1}, "flag is 1; it must be True or False"),
        ({"kind": "c"}, "kind is 'c'; it must be one of: a, b"),
        ({"kind": ["a"]}, "kind is ['a']; it must be one of: a, b"),
        ({"name": ""}, "name is ''; it must be a string of 1 to 4 characters"),
        ({"name": b"x"}, "name is b'x'; it must be a string of 1 to 4 characters"),
        ({"ids": "12"}, "ids is '12'; it must be a list of integers"),
        ({"ids": {1}}, "ids is {1}; it must be a list of integers"),
        ({"ids": [1, 2, 3, 4]}, "ids has 4 entries; it must have at most 3"),
        ({"ids": [1, 10]}, "ids[1] is 10; it must be an integer between 0 and 9"),
        (
            {"ids": np.array([1.0])},
            "ids[0] is np.float64(1.0); it must be an integer between 0 and 9",
        ),
        ({"ids": [[1]]}, "ids[0] is [1]; it must be an integer between 0 and 9"),
        ({"pair": (1, "a")}, "pair[1] is 'a'; it must be an integer, or None"),
        ({"bias": {"1": 1.0}}, "bias has the key '1'; a key must be an integer between 0 and 9"),
        ({"bias": {1: math.inf}}, "bias[1] is inf; it must be a number"),
        ({"bias": [1]}, "bias is [1]; it must be a mapping from integers to numbers, or None"),
        ({"ids": np.array(2)}, "ids is array(2); it must be a list of integers"),
        (
            {"ids": range(2**64)},
            "ids is range(0, 18446744073709551616); it must be a list of integers",
        ),
        ({"ids": Broken()}, "ids is <broken>; it must be a list of integers"),
        ({"pair": np.array(2.0)}, "pair is array(2.); it must be a list of values"),
        ({"ids": BrokenList([1])}, "ids is <broken>; it must be a list of integers"),
        (
            {"bias": BrokenMapping()},
            "bias is {}; it must be a mapping from integers to numbers, or None",
        ),
        ({"needed": Broken()}, "needed is <broken>; it must be an integer between 1 and 8"),
        ({"share": Broken()}, "share is <broken>; it must be a number above 0 and below 1"),
        ({"inner": {"x": 1}}, "inner is {'x': 1}; it must be an instance of Inner, or None"),
    ],
)
def test_what_is_refused_is_named_with_its_value_and_what_is_allowed(
    values: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**values)
    assert str(caught.value) == sentence


def test_numbers_and_arrays_of_numpy_become_plain_ones() -> None:
    config = build(
        needed=np.int32(3), share=np.float32(0.25), either=np.float64(0.5), ids=np.array([1, 2]),
        pair=[None, np.uint8(4)], bias={np.int64(3): 1},
    )  # fmt: skip
    taken = (config.needed, config.share, config.either, config.ids, config.pair, config.bias)
    assert taken == (3, 0.25, 0.5, [1, 2], (None, 4), {3: 1.0})
    assert [type(value) for value in taken] == [int, float, float, list, tuple, dict]
    assert type(config.bias[3]) is float  # type: ignore[index]
    assert type(build(share=Fraction(1, 3)).share) is float


def test_lists_and_mappings_are_copied() -> None:
    ids, bias = [1], {1: 1.0}
    config = build(ids=ids, bias=bias)
    ids.append(99)
    bias[5] = 5.0
    assert (config.ids, config.bias) == ([1], {1: 1.0})


def test_a_list_too_long_is_refused_before_it_is_read() -> None:
    with pytest.raises(ConfigError, match=r"^ids has 1000000000000 entries"):
        build(ids=range(10**12))


def test_declarations_tell_a_command_line_all_it_needs() -> None:
    told = {d.name: d for d in declarations(Config)}
    assert [*told] == [field.name for field in fields(Config)]
    assert (told["needed"].type, told["needed"].is_optional, told["needed"].help) == (
        int,
        False,
        "how many",
    )
    assert (told["needed"].bounds.low, told["needed"].bounds.high) == (1, 8)
    assert (told["maybe"].type, told["maybe"].is_optional, told["maybe"].default) == (
        int,
        True,
        None,
    )
    assert told["kind"].choices == ("a", "b")
    assert told["ids"].default == []


def test_every_engine_option_has_help_and_its_default_is_allowed() -> None:
    EngineConfig()
    for told in declarations(EngineConfig):
        assert told.help and "\n" not in told.help and not told.help.endswith("."), told.name


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_model_len": 1.5},
        {"max_model_len": "4"},
        {"max_num_seqs": "4"},
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": True},
        {"block_size": 1025},
        {"enable_prefix_caching": "no"},
        {"enable_prefix_caching": 1},
        {"kv_cache_memory": -1},
        {"kv_cache_memory": 1.5},
        {"kv_cache_memory": True},
        {"kv_cache_memory": math.nan},
        {"kv_cache_dtype": 8},
        {"scheduling_policy": "lifo"},
        {"preemption": None},
        {"swap_space": -1},
        {"swap_space": math.inf},
        {"swap_space": "4GiB"},
        {"seed": 0.5},
        {"max_waiting_requests": 0},
        {"backend": None},
    ],
)
def test_the_engine_refuses_values_of_other_types_and_beyond_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} is .*; it must be "):
        EngineConfig(**wrong)


def test_swap_space_is_in_gibibytes_as_in_vllm() -> None:
    assert EngineConfig(swap_space=4).swap_bytes == 4 << 30
    assert EngineConfig(swap_space=0).swap_bytes == 0


anything: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a\n", max_size=5)
    | st.binary(max_size=5) | st.complex_numbers() | st.sampled_from([np.int8(3), np.array(2)]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.integers() | st.text("ab", max_size=3), inner, max_size=3)
    | st.tuples(inner),
    max_leaves=5,
)  # fmt: skip


@settings(deadline=None)
@given(st.sampled_from([Config, EngineConfig]), st.data())
def test_nonsense_gives_one_short_sentence_or_a_sound_config(kind: type, data: Any) -> None:
    names = [field.name for field in fields(kind)]
    values = data.draw(st.dictionaries(st.sampled_from(names), anything, max_size=4))
    try:
        built = kind(**({"needed": 1} | values if kind is Config else values))
    except ConfigError as error:
        assert len(str(error)) < 400 and "\n" not in str(error)
    else:
        check_fields(built)


def test_single_values_are_checked_alike_with_the_callers_error() -> None:
    assert check_value("priority", np.int64(3), int) == 3
    with pytest.raises(RequestError, match=r"^priority is 'a'; it must be an integer$"):
        check_value("priority", "a", int, error=RequestError)


class Loud:
    def __repr__(self) -> str:
        return "line\n" * 10**4


def test_values_are_shown_short_and_on_one_line() -> None:
    for value in (
        "x" * 10**6,
        b"x" * 10**6,
        [10**6000] * 9,
        Loud(),
        np.zeros((50, 50)),
        {1: Loud()},
    ):
        assert len(show(value)) < 200 and "\n" not in show(value)


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    assert unknown("option", "max_num_seq", ["max_num_seqs", "seed"]) == (
        "there is no option 'max_num_seq'; did you mean 'max_num_seqs'? "
        "The names are: max_num_seqs, seed"
    )
    assert unknown("option", "dtype", ["seed"], {"dtype": "weights keep theirs"}) == (
        "there is no option 'dtype': weights keep theirs; the names are: seed"
    )
