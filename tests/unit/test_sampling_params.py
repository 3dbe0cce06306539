"""SamplingParams refuses what is impossible, in a sentence that names the field, and
check_token_ids what the vocabulary does not hold.
"""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pellucid import EngineConfig, PoolingParams, StructuredOutputsParams
from pellucid.errors import ConfigError
from pellucid.sampling import check_token_ids
from pellucid.sampling_params import (
    ELSEWHERE,
    MAX_LOGPROBS,
    MAX_N,
    MAX_STOP_STRINGS,
    SamplingParams,
)

INTEGERS = {  # name: (lowest, highest allowed)
    "n": (1, MAX_N),
    "top_k": (-1, 2**63 - 1),
    "seed": (-(2**63), 2**64 - 1),
    "logprobs": (-1, MAX_LOGPROBS),
    "prompt_logprobs": (-1, MAX_LOGPROBS),
    "max_tokens": (1, 2**63 - 1),
}
REALS = {  # name: (lowest, highest allowed)
    "temperature": (0.0, 1e6),
    "top_p": (math.ulp(0.0), 1.0),
    "typical_p": (math.ulp(0.0), 1.0),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (math.ulp(0.0), 1e6),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}
FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")


def build(**fields: Any) -> SamplingParams:
    return SamplingParams(**fields)


def test_defaults_are_sound() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p, params.max_tokens, params.stop) == (
        1.0,
        0,
        1.0,
        16,
        [],
    )


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_taken_up_to_their_limits_and_refused_beyond(name: str) -> None:
    low, high = INTEGERS[name]
    for value in (low, high):
        assert getattr(build(**{name: value}), name) == value
    for wrong in (low - 1, high + 1, 1.0, "1", True, float("nan"), 10**6000):
        with pytest.raises(
            ConfigError, match=f"^{name} is .*; it must be an integer between {low} and {high}"
        ):
            build(**{name: wrong})


@pytest.mark.parametrize("name", REALS)
def test_reals_are_taken_up_to_their_limits_and_refused_beyond(name: str) -> None:
    low, high = REALS[name]
    for value in (low, high, 1):
        assert getattr(build(**{name: value}), name) == value
    for wrong in (
        low - 1e-9,
        high + 1e-9,
        float("nan"),
        float("inf"),
        -float("inf"),
        "1",
        True,
        1j,
        None,
        10**6000,
    ):
        with pytest.raises(ConfigError, match=f"^{name} is .*; it must be a number "):
            build(**{name: wrong})


@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_true_or_false(name: str) -> None:
    for value in (1, "yes", None):
        with pytest.raises(ConfigError, match=f"^{name} is .*; it must be True or False$"):
            build(**{name: value})


@pytest.mark.parametrize("name", ["allowed_token_ids", "stop_token_ids"])
def test_token_ids_are_lists_of_integers_that_a_vocabulary_could_hold(name: str) -> None:
    build(**{name: [0, (1 << 24) - 1]})
    build(**{name: (3,)})
    for value in (-1, 1 << 24, 1.0, "7", False, None):
        with pytest.raises(ConfigError, match=rf"^{name}\[1\] is "):
            build(**{name: [5, value]})
    for wrong in (5, "57", b"57", {5}, {5: 1}):
        with pytest.raises(
            ConfigError, match=f"^{name} is .*; it must be a list of integers, or None$"
        ):
            build(**{name: wrong})


def test_allowing_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^allowed_token_ids has 0 entries"):
        SamplingParams(allowed_token_ids=[])


@pytest.mark.parametrize("name", ["stop", "bad_words"])
def test_strings_are_not_empty_and_not_endless(name: str) -> None:
    build(**{name: ["x" * 1024, "é"]})
    for value in ("", "x" * 1025, 5, b"x", None):
        with pytest.raises(
            ConfigError, match=rf"^{name}\[1\] is .*; it must be a string of 1 to 1024 characters$"
        ):
            build(**{name: ["a", value]})
    for wrong in (5, b"stop", {"a"}, {"a": 1}):
        with pytest.raises(
            ConfigError, match=f"^{name} is .*; it must be .*a list of strings, or None$"
        ):
            build(**{name: wrong})


def test_one_stop_string_may_stand_without_its_list_but_a_bad_word_may_not() -> None:
    assert SamplingParams(stop="END").stop == ["END"]
    assert SamplingParams(stop=("a", "b")).stop == ["a", "b"]
    with pytest.raises(ConfigError, match=r"^stop"):
        SamplingParams(stop="")
    with pytest.raises(ConfigError, match=r"^bad_words"):
        SamplingParams(bad_words="word")


@pytest.mark.parametrize(
    ("name", "entry", "limit"),
    [("stop", "a", MAX_STOP_STRINGS), ("bad_words", "a", 1024), ("stop_token_ids", 1, 1024)],
)
def test_lists_have_a_limit(name: str, entry: object, limit: int) -> None:
    build(**{name: [entry] * limit})
    with pytest.raises(ConfigError, match=f"^{name} has {limit + 1} entries"):
        build(**{name: [entry] * (limit + 1)})


def test_logit_bias_maps_token_ids_to_bounded_numbers() -> None:
    SamplingParams(logit_bias={0: -100, 1: 100.0})
    SamplingParams(logit_bias=dict.fromkeys(range(4096), 1.0))
    with pytest.raises(ConfigError, match=r"^logit_bias has 4097 entries"):
        SamplingParams(logit_bias=dict.fromkeys(range(4097), 1.0))
    for bias in (100.5, float("nan"), "1", True, None):
        with pytest.raises(ConfigError, match=r"^logit_bias\[7\] is "):
            build(logit_bias={7: bias})
    for token_id in (-1, "7", 7.0, True, 1 << 24):
        with pytest.raises(
            ConfigError, match=r"^logit_bias has the key .*; a key must be an integer"
        ):
            build(logit_bias={token_id: 1.0})
    with pytest.raises(ConfigError, match=r"^logit_bias is .*; it must be a mapping from"):
        build(logit_bias=[(1, 2.0)])


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    SamplingParams(min_tokens=5000, max_tokens=None)
    with pytest.raises(
        ConfigError, match=r"^min_tokens is 6; it must be at most max_tokens, which is 5$"
    ):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_stop_strings_need_text() -> None:
    SamplingParams(detokenize=False)
    with pytest.raises(ConfigError, match=r"^stop is .* detokenize must be True$"):
        SamplingParams(stop=["x"], detokenize=False)


def test_a_value_set_later_is_found_by_check() -> None:
    params = SamplingParams()
    params.temperature = -1.0
    with pytest.raises(ConfigError, match=r"^temperature"):
        params.check()


def test_a_clone_shares_nothing_with_its_original_and_is_checked() -> None:
    ids, bias, words = [1], {1: 1.0}, ["a"]
    params = SamplingParams(stop="x", stop_token_ids=ids, logit_bias=bias, bad_words=words)
    clone = params.clone()
    assert clone == params
    ids.append(2)
    bias[2] = 2.0
    words.append("b")
    params.stop.append("y")  # type: ignore[union-attr]
    params.stop_token_ids.append(3)  # type: ignore[union-attr]
    assert (clone.stop, clone.stop_token_ids, clone.logit_bias, clone.bad_words) == (
        ["x"],
        [1],
        {1: 1.0},
        ["a"],
    )
    params.stop.append(5)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"^stop\[2\] is 5; it must be a string of 1 to 1024"):
        params.clone()


@pytest.mark.parametrize(
    ("name", "value"), [("temperature", -1), ("n", -1), ("top_p", math.nan), ("seed", "1")]
)
def test_a_clone_refuses_what_was_set_after_construction(name: str, value: object) -> None:
    params = SamplingParams()
    setattr(params, name, value)
    with pytest.raises(ConfigError, match=f"^{name} is "):
        params.clone()


def test_numbers_of_numpy_are_taken_as_plain_ones() -> None:
    params = build(temperature=np.float32(0.5), top_k=np.int64(5), stop_token_ids=np.array([1, 2]))
    assert (params.temperature, params.top_k, params.stop_token_ids) == (0.5, 5, [1, 2])
    assert [type(v) for v in (params.temperature, params.top_k)] == [float, int]


def test_a_seed_of_minus_one_is_none_as_in_vllm() -> None:
    assert SamplingParams(seed=-1).seed is None


def test_from_optional_takes_the_fields_of_json() -> None:
    assert SamplingParams.from_optional() == SamplingParams()
    params = SamplingParams.from_optional(
        temperature=None, top_p=0.5, max_tokens=None, stop=None, logit_bias={"7": 1, 8: -1.0}
    )
    assert (params.temperature, params.top_p, params.max_tokens) == (1.0, 0.5, None)
    assert params.logit_bias == {7: 1.0, 8: -1.0}
    with pytest.raises(ConfigError, match=r"'temprature'; did you mean 'temperature'\? The names"):
        SamplingParams.from_optional(temprature=1)
    for key in ("x", "-1", "1.0", "", "9" * 5000, "١"):
        with pytest.raises(ConfigError, match=r"^logit_bias has the key .*; a key must be an int"):
            SamplingParams.from_optional(logit_bias={key: 1.0})


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"best_of": 2}, "no sampling parameter 'best_of': all n answers are returned; choose"),
        ({"use_beam_search": True}, "'use_beam_search': there is no beam search"),
        ({"guided_decoding": None}, "'guided_decoding': its name here is structured_outputs"),
        ({"max_new_tokens": 5}, "'max_new_tokens': its name here is max_tokens"),
        ({"temprature": 1.0}, r"'temprature'; did you mean 'temperature'\? The names are: "),
        ({"xyzzy": 1}, "no sampling parameter 'xyzzy'; the names are: allowed_token_ids, "),
    ],
)
def test_a_field_that_does_not_exist_is_answered_with_its_name_here_the_nearest_or_all(
    fields: dict[str, Any], sentence: str
) -> None:
    for build in (SamplingParams, SamplingParams.from_optional):
        with pytest.raises(ConfigError, match=sentence):
            build(**fields)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (PoolingParams, "pooling parameter"),
        (StructuredOutputsParams, "field of structured_outputs"),
        (EngineConfig, "option"),
    ],
)
def test_every_class_of_parameters_answers_a_wrong_name_alike(kind: Any, what: str) -> None:
    first = next(iter(kind.__dataclass_fields__))
    with pytest.raises(ConfigError, match=rf"no {what} '{first}s'; did you mean '{first}'\?"):
        kind(**{first + "s": None})
    with pytest.raises(ConfigError, match=rf"^{kind.__name__} is given 0\.5 without a name; write"):
        kind(0.5)


def test_no_name_said_to_be_elsewhere_is_a_field() -> None:
    assert not set(SamplingParams.__dataclass_fields__) & set(ELSEWHERE)


anything: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text("a\n\0é", max_size=5)
    | st.binary(max_size=5)
    | st.complex_numbers(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.integers() | st.text("ab", max_size=3), inner, max_size=3)
        | st.tuples(inner)
    ),
    max_leaves=5,
)


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(SamplingParams.__dataclass_fields__)), anything, max_size=4
    )
)
def test_nonsense_gives_a_short_config_error_and_nothing_else(fields: dict[str, Any]) -> None:
    try:
        SamplingParams(**fields).check()
    except ConfigError as error:
        assert len(str(error)) < 400 and "\n" not in str(error)


def test_token_ids_are_checked_against_the_vocabulary() -> None:
    check_token_ids(
        SamplingParams(logit_bias={99: 1.0}, allowed_token_ids=[0, 99], stop_token_ids=[99]), 100
    )
    check_token_ids(SamplingParams(), 1)
    for fields in (
        {"logit_bias": {100: 1.0}},
        {"allowed_token_ids": [3, 100]},
        {"stop_token_ids": [100]},
    ):
        with pytest.raises(
            ConfigError, match=r"holds token id 100; the model's token ids lie between 0 and 99$"
        ):
            check_token_ids(build(**fields), 100)
