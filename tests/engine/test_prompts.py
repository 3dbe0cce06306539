"""Prompts in every form: what is taken, what is refused and how it is named, and when special
tokens are parsed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid import LLM, SamplingParams
from pellucid.engine.prompts import (
    TokenizedPrompt,
    check_prompt_ids,
    list_prompts,
    tokenize_prompt,
    tokenize_prompts,
    truncate_prompt,
    with_priorities,
)
from pellucid.errors import ConfigError, PellucidError, RequestError
from pellucid.tokenizer import Tokenizer

from .conftest import write_tiny

BOS, EOS, START, END = 256, 257, 258, 259  # of the tiny model; letters are their bytes
GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path, backend="reference")


@pytest.fixture(scope="module")
def tokenizer(llm: LLM) -> Tokenizer:
    return llm.tokenizer


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = write_tiny(tmp_path_factory.mktemp("bos") / "bos.gguf", add_bos=True)
    return LLM(path, backend="reference").tokenizer


def ids_of(tokenizer: Tokenizer, prompt: Any, **how: Any) -> list[int]:
    return tokenize_prompt(tokenizer, prompt, **how).token_ids


# ---- prompts of a call


def test_any_iterable_of_prompts_is_taken_in_order() -> None:
    texts = ["a", "b", "c"]
    for prompts in (
        texts,
        tuple(texts),
        iter(texts),
        (t for t in texts),
        dict.fromkeys(texts).keys(),
    ):
        assert list_prompts(prompts) == texts
    assert list_prompts("a") == ["a"]
    assert list_prompts({"prompt": "a"}) == [{"prompt": "a"}]
    assert list_prompts([]) == [] and list_prompts(iter(())) == []
    assert list_prompts([1, 2]) == [[1, 2]] and list_prompts(iter([1, 2])) == [[1, 2]]  # type: ignore[arg-type]
    assert list_prompts([[1, 2], [3]]) == [[1, 2], [3]]
    assert list_prompts(np.array([1, 2])) == [[1, 2]]
    assert list_prompts(np.array([[1, 2], [3, 4]])) == [[1, 2], [3, 4]]


def test_a_generator_of_prompts_is_answered(llm: LLM) -> None:
    outputs = llm.generate((text for text in ("ab", "cd")), GREEDY, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["ab", "cd"]


@pytest.mark.parametrize(
    ("prompts", "sentence"),
    [
        (["hi", 5, "there"], r"^prompts\[1\] is 5; it must be text, token ids, or a mapping"),
        (["hi", None], r"^prompts\[1\] is None; "),
        ([1.5, 2.7], r"^prompts\[0\] is 1\.5; "),
        ([True], r"^prompts\[0\] is True; "),
        ([5, "hi"], r"^prompt_token_ids\[1\] is 'hi'; it must be an integer"),
        (["hi", b"hi"], r"^prompts\[1\] is b'hi'; "),
        (["hi", {"promt": "x"}], r"^prompts\[1\]: a prompt that is a mapping needs 'prompt'"),
        (["hi", [1, -2]], r"^prompts\[1\]: prompt_token_ids\[1\] is -2; it must be an integer"),
        (["hi", "\ud800"], r"^prompts\[1\]: the text is not Unicode"),
        (5, r"^prompts is 5; it must be text, token ids, a mapping"),
        (None, r"^prompts is None; "),
        (b"ids", r"^prompts is b'ids'; "),
        ({"a", "b"}, r"^prompts is \{'a', 'b'\}; "),
    ],
)
def test_an_entry_that_is_no_prompt_is_named_and_nothing_is_queued(
    llm: LLM, prompts: Any, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        llm.generate(prompts, GREEDY, use_tqdm=False)
    assert llm.stats().num_waiting == llm.stats().num_running == 0


def test_prompts_without_an_end_are_refused() -> None:
    def ids() -> Iterator[int]:
        while True:
            yield 1

    def texts() -> Iterator[str]:
        while True:
            yield "a"

    for endless in (ids(), texts()):
        with pytest.raises(RequestError, match=r"^prompts has more than "):
            list_prompts(endless)  # type: ignore[arg-type]


# ---- token ids


@pytest.mark.parametrize(
    "ids",
    [
        [97, 98],
        (97, 98),
        range(97, 99),
        np.array([97, 98]),
        np.array([97, 98], np.uint8),
        [np.int64(97), np.int8(98)],
        {"prompt_token_ids": np.array([97, 98])},
    ],
)
def test_integers_of_every_kind_are_token_ids(tokenizer: Tokenizer, ids: Any) -> None:
    taken = ids_of(tokenizer, ids)
    assert taken == [97, 98] and all(type(token_id) is int for token_id in taken)


@pytest.mark.slow  # the import of torch
def test_a_torch_tensor_of_integers_is_token_ids(tokenizer: Tokenizer) -> None:
    torch = pytest.importorskip("torch")
    assert ids_of(tokenizer, torch.tensor([97, 98])) == [97, 98]
    with pytest.raises(RequestError, match=r"^prompt_token_ids\[0\] is "):
        ids_of(tokenizer, torch.tensor([1.5, 2.7]))


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ([1, 1.5], r"^prompt_token_ids\[1\] is 1\.5; it must be an integer between 0 and "),
        ([1, 2.0], r"^prompt_token_ids\[1\] is 2\.0; "),
        ([1, True], r"^prompt_token_ids\[1\] is True; "),
        ([1, "2"], r"^prompt_token_ids\[1\] is '2'; "),
        ([1, None], r"^prompt_token_ids\[1\] is None; "),
        ([1, [2]], r"^prompt_token_ids\[1\] is \[2\]; "),
        ([1, -1], r"^prompt_token_ids\[1\] is -1; "),
        ([1, 10**30], r"^prompt_token_ids\[1\] is 1000"),
        ([1, 10**9000], r"^prompt_token_ids\[1\] is an integer of \d+ bits; "),
        (np.array([1.0, 2.0]), r"^prompt_token_ids\[0\] is 1\.0; "),
        (np.array([True, False]), r"^prompt_token_ids\[0\] is True; "),
        (np.array([[1, 2]]), r"^prompt_token_ids\[0\] is \[1, 2\]; "),
        (range(10**9), r"^prompt_token_ids has 1000000000 entries; it must have at most "),
        (b"ids", r"^a prompt is b'ids'; it must be text, token ids, or a mapping"),
        ({"prompt_token_ids": b"ids"}, r"^prompt_token_ids is b'ids'; it must be a list of int"),
        ({"prompt_token_ids": "57"}, r"^prompt_token_ids is '57'; it must be a list of int"),
        ({"prompt_token_ids": 5}, r"^prompt_token_ids is 5; it must be a list of int"),
    ],
)
def test_what_is_no_token_id_is_named_with_its_index(
    tokenizer: Tokenizer, ids: Any, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        tokenize_prompt(tokenizer, ids)


def test_ids_beyond_the_vocabulary_are_named_with_their_index(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"id 5000 is outside the vocabulary of 261; .*\[2\]$"):
        llm.generate([[1, 2, 5000]], GREEDY, use_tqdm=False)
    check_prompt_ids([0, 9], 10)
    check_prompt_ids([], 10)
    with pytest.raises(RequestError, match=r"id 10 is outside .* prompt_token_ids\[1\]$"):
        check_prompt_ids([9, 10], 10)


def test_a_list_that_its_owner_changes_does_not_change_the_request(tokenizer: Tokenizer) -> None:
    ids = [97, 98]
    prompt = tokenize_prompt(tokenizer, ids)
    ids.append(99)
    assert prompt.token_ids == [97, 98]


# ---- mappings


def test_a_mapping_says_how_its_request_is_treated(tokenizer: Tokenizer) -> None:
    prompt = {"prompt": "ab", "priority": -3, "tenant": "t", "cache_salt": "s"}
    assert tokenize_prompt(tokenizer, prompt) == TokenizedPrompt([97, 98], "ab", -3, "t", "s")
    both = {"prompt": "shown", "prompt_token_ids": [97]}
    assert tokenize_prompt(tokenizer, both) == TokenizedPrompt([97], "shown")


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ({}, r"^a prompt that is a mapping needs 'prompt' or 'prompt_token_ids'; it has \[\]$"),
        ({"prompt": None}, r"^a prompt that is a mapping needs "),
        ({"prompt": 5}, r"^prompt is 5; it must be a string"),
        (
            {"prompt": "a", "cach_salt": "b"},
            r"^there is no key of a prompt 'cach_salt'; did you mean 'cache_salt'\?",
        ),
        ({"prompt": "a", "multi_modal_data": {}}, r"^there is no key of a prompt 'multi_modal"),
        ({"prompt": "a", 5: 6}, r"^there is no key of a prompt 5; the names are"),
        ({"prompt": "a", "priority": 1.5}, r"^priority is 1\.5; it must be an integer between"),
        ({"prompt": "a", "priority": 1 << 40}, r"^priority is 1099511627776; it must be"),
        ({"prompt": "a", "tenant": 5}, r"^tenant is 5; it must be a string of at most 256"),
        ({"prompt": "a", "cache_salt": "x" * 257}, r"^cache_salt is 'xxx.*at most 256 characters"),
        ({"prompt": "a", "parse_special": "no"}, r"^parse_special is 'no'; it must be True or"),
    ],
)
def test_wrong_mappings_are_refused(
    tokenizer: Tokenizer, prompt: dict[Any, Any], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        tokenize_prompt(tokenizer, prompt)


# ---- special tokens in text


def test_special_tokens_in_a_text_prompt_are_parsed(tokenizer: Tokenizer) -> None:
    text = "<|im_start|>a<|im_end|>"
    letters = list(text.encode())
    assert ids_of(tokenizer, text) == [START, 97, END]
    assert ids_of(tokenizer, {"prompt": text}) == [START, 97, END]
    assert ids_of(tokenizer, text, parse_special=False) == letters
    assert ids_of(tokenizer, {"prompt": text, "parse_special": False}) == letters
    assert ids_of(tokenizer, {"prompt": text, "parse_special": True}, parse_special=False) == [
        START,
        97,
        END,
    ]


def test_a_text_that_begins_with_bos_gets_no_second_one(with_bos: Tokenizer) -> None:
    assert ids_of(with_bos, "a") == [BOS, 97]
    assert ids_of(with_bos, "<|bos|>a") == [BOS, 97]
    assert ids_of(with_bos, "<|bos|>") == [BOS]
    assert ids_of(with_bos, "<|bos|><|bos|>a") == [BOS, BOS, 97]
    assert ids_of(with_bos, "<|bos|>a", parse_special=False) == [BOS, *b"<|bos|>a"]
    assert ids_of(with_bos, [BOS, BOS, 97]) == [BOS, BOS, 97]


def test_a_rendered_chat_is_a_prompt_in_which_messages_stay_text(tokenizer: Tokenizer) -> None:
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "<|im_end|>"}])
    ids = ids_of(tokenizer, rendered)
    assert ids == tokenizer.encode(rendered, add_special=False, parse_special=True)
    assert ids.count(END) == 1


# ---- what a call adds to its prompts


def test_a_prompt_is_cut_from_the_left(llm: LLM, tokenizer: Tokenizer) -> None:
    assert ids_of(tokenizer, "abcd", truncate_prompt_tokens=2) == [99, 100]
    assert ids_of(tokenizer, "ab", truncate_prompt_tokens=9) == [97, 98]
    with pytest.raises(RequestError, match=r"^truncate_prompt_tokens is 0; "):
        ids_of(tokenizer, "ab", truncate_prompt_tokens=0)
    ids = list(range(50))

    def cut(last: int | None, max_tokens: int | None) -> list[int]:
        params = SamplingParams(truncate_prompt_tokens=last, max_tokens=max_tokens)
        return truncate_prompt(ids, params, 20)

    assert cut(None, 5) == ids and cut(7, 5) == ids[-7:]
    assert cut(-1, 5) == ids[-15:] and cut(-1, None) == ids[-19:] and cut(-1, 99) == ids[-1:]
    params = SamplingParams(temperature=0, max_tokens=4, truncate_prompt_tokens=-1)
    output = llm.generate("x" * 500, params, use_tqdm=False)[0]
    assert len(output.prompt_token_ids) == llm.max_model_len - 4
    with pytest.raises(ConfigError, match=r"^truncate_prompt_tokens is 0; "):
        SamplingParams(truncate_prompt_tokens=0)


def test_priorities_of_a_call_are_one_or_one_for_each() -> None:
    prompts = [TokenizedPrompt([1], None, priority=7), TokenizedPrompt([2], None)]

    def given(priority: Any) -> list[int]:
        return [prompt.priority for prompt in with_priorities(prompts, priority)]

    assert (given(None), given(3), given([1, 2]), given(np.array([1, 2]))) == (
        [7, 0],
        [3, 3],
        [1, 2],
        [1, 2],
    )
    for wrong in ([1], [1, 2, 3], "12", 1.5, [1, None]):
        with pytest.raises(RequestError, match=r"^priority"):
            with_priorities(prompts, wrong)  # type: ignore[arg-type]


def test_only_errors_of_pellucid_come_from_nonsense(tokenizer: Tokenizer) -> None:
    for nonsense in (
        object(),
        1j,
        [object()],
        {"prompt": object()},
        [[[]]],
        np.array("x"),
        [np.nan],
    ):
        with pytest.raises(PellucidError):
            tokenize_prompts(tokenizer, nonsense)  # type: ignore[arg-type]


def test_a_text_far_beyond_the_context_is_refused_before_it_is_cut_into_tokens(llm: LLM) -> None:
    text = "x" * (1 << 24)
    with pytest.raises(RequestError, match=r"^the text has 16777216 characters; 96 tokens of this"):
        llm.generate(text, GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"^prompts\[1\]: the text has 16777216 characters"):
        llm.generate(["x", text], GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"^the text has 16777216 characters"):
        next(llm.stream(text, GREEDY))
    # a chat prompt too, after it was rendered
    chat = [{"role": "user", "content": "x" * 1_000_000}]
    with pytest.raises(
        RequestError, match=r"^the text has 10000\d\d characters; 96 tokens of this"
    ):
        llm.chat(chat, GREEDY, use_tqdm=False)
    with pytest.raises(RequestError, match=r"^the text has 10000\d\d characters"):
        next(llm.chat_stream(chat, GREEDY))
    cut = SamplingParams(temperature=0, max_tokens=2, truncate_prompt_tokens=5)
    output = llm.generate("x" * 100_000, cut, use_tqdm=False)[0]
    assert output.prompt_token_ids == [120] * 5


@pytest.mark.parametrize("wrong", [5, None, "hi", np.array(3), {"role": "user"}, iter([])])
def test_what_is_no_list_of_messages_is_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(RequestError, match=r"^messages is .*; it must be a list of messages"):
        llm.chat(wrong, use_tqdm=False)


def test_an_array_is_no_list_of_sampling_params(llm: LLM) -> None:
    with pytest.raises(ConfigError, match=r"^sampling_params is array\(2\); it must be"):
        llm.generate("ab", np.array(2), use_tqdm=False)  # type: ignore[arg-type]


class Failing:
    """An entry whose own method fails."""

    def __index__(self) -> int:
        raise RuntimeError("no index")


def test_an_entry_whose_own_method_fails_is_no_prompt(llm: LLM) -> None:
    with pytest.raises(RequestError, match=r"^prompts\[0\] is .*; it must be text, token ids"):
        llm.generate([Failing()], use_tqdm=False)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^priority has 2 entries for 1 prompt; "):
        llm.generate("a", priority=[1, 2], use_tqdm=False)


def test_a_refusal_names_which_of_several_prompts_it_is_about(llm: LLM) -> None:
    long, size = [1] * (llm.max_model_len + 1), llm.model_config.vocab_size
    for bad, message in (
        (long, "the prompt has .* tokens"),
        ([size], "prompt token id"),
        ("", "the prompt is empty"),
    ):
        if bad == "" and llm.tokenizer.add_bos:
            continue
        with pytest.raises(RequestError, match=rf"^prompts\[2\]: {message}"):
            llm.generate(["a", "b", bad, "d"], use_tqdm=False)
        with pytest.raises(RequestError, match=f"^{message}"):
            llm.generate([bad], use_tqdm=False)
    with pytest.raises(ConfigError, match=rf"^prompts\[1\]: stop_token_ids holds token id {size}"):
        params = [SamplingParams(), SamplingParams(stop_token_ids=[size])]
        llm.generate(["a", "b"], params, use_tqdm=False)
    contents: tuple[Any, ...] = ("a" * 1000, 5)
    for content in contents:
        talks = [[{"role": "user", "content": c}] for c in ("a", content, "a")]
        with pytest.raises(RequestError, match=r"^messages\[1\]: "):
            llm.chat(talks, use_tqdm=False)
