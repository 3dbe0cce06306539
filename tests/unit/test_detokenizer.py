"""Streaming text: what is shown is never taken back, and is the same however the tokens come."""

import codecs
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pellucid.errors import RequestError
from pellucid.tokenizer import Detokenizer, Tokenizer
from pellucid.tokenizer.from_gguf import from_gguf

from .tokenizer_vocabularies import byte_level, sentencepiece

BYTES = from_gguf(byte_level())
SPACES = from_gguf(sentencepiece())
TOKENIZERS = st.sampled_from([BYTES, SPACES])
# Few letters, so that stop strings are met, begun and missed; whole tokens; and any byte, so that
# characters are cut and broken.
STOPS = st.lists(st.text("ab \né", min_size=1, max_size=5), max_size=4)
TEXT = st.text("ab \né😀", max_size=20)


@st.composite
def streams(draw: st.DrawFn) -> tuple[Tokenizer, list[int], list[list[int]]]:
    """(a tokenizer, ids, the same ids cut into pieces)."""
    tokenizer = draw(TOKENIZERS)
    ids = draw(TEXT.map(lambda text: tokenizer.encode(text, add_special=False)))
    ids += draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8))
    ids += draw(TEXT.map(lambda text: tokenizer.encode(text, add_special=False)))
    cuts = sorted(draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    return tokenizer, ids, [ids[start:end] for start, end in pairwise([0, *cuts, len(ids)])]


def cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The text up to the stop string that is complete first, and that stop string; of several, the
    longest.
    """
    for end in range(1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@given(streams(), STOPS, st.booleans(), st.booleans())
def test_any_cutting_gives_the_whole_text_up_to_the_first_stop_string(
    stream: tuple[Tokenizer, list[int], list[list[int]]],
    stops: list[str],
    include: bool,
    skip_special: bool,
) -> None:
    tokenizer, ids, pieces = stream
    text = Detokenizer(tokenizer, stop=stops, include_stop=include, skip_special=skip_special)
    shown = [text.push(piece) for piece in pieces]
    shown.append(text.finish())
    expected, stopped_by = cut(tokenizer.decode(ids, skip_special=skip_special), stops, include)
    assert "".join(shown) == expected
    assert (text.text, text.stopped_by) == (expected, stopped_by)
    if not include:
        assert not any(stop in text.text for stop in stops)


@given(streams(), STOPS)
def test_nothing_is_held_back_that_the_future_cannot_change(
    stream: tuple[Tokenizer, list[int], list[list[int]]], stops: list[str]
) -> None:
    tokenizer, ids, _ = stream
    text = Detokenizer(tokenizer, stop=stops, skip_special=False)
    for count, token_id in enumerate(ids, 1):
        text.push([token_id])
        if text.stopped_by is not None:
            return
        whole = b"".join(map(tokenizer.token_bytes, ids[:count]))
        whole = whole.removeprefix(b" ") if tokenizer.strips_leading_space else whole
        held = whole.decode(errors="replace").removeprefix(text.text)
        begun = max(
            (len(head) for stop in stops for head in heads(stop) if complete(whole).endswith(head)),
            default=0,
        )
        unfinished = len(whole.decode(errors="replace")) - len(complete(whole))
        assert len(held) == begun + unfinished


def heads(stop: str) -> list[str]:
    return [stop[:n] for n in range(1, len(stop))]


def complete(data: bytes) -> str:
    """`data` as text, without the character that it may end in the middle of."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(data)


@given(streams(), STOPS, st.integers(0, 30))
@example((BYTES, BYTES.encode("aabab"), [BYTES.encode("aabab")]), ["ab"], 1)
def test_stop_strings_completed_by_the_first_tokens_do_not_count(
    stream: tuple[Tokenizer, list[int], list[list[int]]], stops: list[str], min_tokens: int
) -> None:
    tokenizer, ids, pieces = stream
    text = Detokenizer(tokenizer, stop=stops, min_tokens=min_tokens)
    for piece in pieces:
        text.push(piece)
    text.finish()
    free = Detokenizer(tokenizer)
    early = len(free.push(ids[:min_tokens]))  # characters that are complete by then
    whole = tokenizer.decode(ids)
    ends = [
        end
        for end in range(early + 1, len(whole) + 1)
        if any(whole[:end].endswith(stop) for stop in stops)
    ]
    if len(ids) <= min_tokens or not ends:
        assert (text.text, text.stopped_by) == (whole, None)
    else:
        assert text.text == whole[: ends[0] - len(text.stopped_by or "")]


def test_half_a_character_is_never_shown() -> None:
    text = Detokenizer(BYTES)
    assert [text.push([byte]) for byte in "é😀".encode()] == ["", "é", "", "", "", "😀"]
    assert [text.push([0xF0]), text.push([0x9F]), text.push([0x41])] == ["", "", "\ufffdA"]
    assert text.push([0xE2]) == ""
    assert text.finish() == "\ufffd"
    assert text.text == "é😀\ufffdA\ufffd"


def test_a_stop_string_is_found_across_tokens() -> None:
    text = Detokenizer(BYTES, stop=["world!"])
    assert [
        text.push(BYTES.encode(part)) for part in ("hello", " world", "?", " world", "!", "more")
    ] == ["hello", " ", "world?", " ", "", ""]
    assert (text.finish(), text.stopped_by, text.text) == ("", "world!", "hello world? ")


def test_of_stop_strings_that_end_together_the_longest_counts_and_the_first_that_ends_wins() -> (
    None
):
    assert Detokenizer(BYTES, stop=["b", "ab"]).push(BYTES.encode("xab")) == "x"
    assert Detokenizer(BYTES, stop=["abab", "b"]).push(BYTES.encode("xabab")) == "xa"
    text = Detokenizer(BYTES, stop=["aab"])  # its own beginning follows a false start
    assert text.push(BYTES.encode("aaab")) == "a"


def test_a_stop_string_that_did_not_count_may_begin_one_that_does() -> None:
    text = Detokenizer(BYTES, stop=["xyx"], min_tokens=3)
    assert text.push(BYTES.encode("xyxyx")) == "xy"


def test_the_stop_string_stays_where_it_is_asked_for() -> None:
    text = Detokenizer(BYTES, stop=["lo"], include_stop=True)
    assert (text.push(BYTES.encode("hello you")), text.stopped_by) == ("hello", "lo")


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(RequestError, match="empty"):
        Detokenizer(BYTES, stop=["a", ""])


def test_the_first_space_is_taken_away_at_the_beginning_of_a_text_only() -> None:
    hello = SPACES.encode("hello", add_special=False)
    assert SPACES.token_bytes(hello[0]) == b" hello"
    assert Detokenizer(SPACES).push(hello) == "hello"
    assert Detokenizer(SPACES, prompt_tail=SPACES.encode("a")).push(hello) == " hello"
    # a prompt of a control token alone has no words
    assert Detokenizer(SPACES, prompt_tail=[1]).push(hello) == "hello"
    assert Detokenizer(SPACES, prompt_tail=[1], skip_special=False).push(hello) == " hello"
    assert Detokenizer(SPACES).push(hello * 2) == "hello hello"
    text = Detokenizer(SPACES)
    assert [text.push([2]), text.push(hello), text.push(hello)] == ["", "hello", " hello"]
    assert Detokenizer(from_gguf(sentencepiece(add_space_prefix=False))).push(hello) == " hello"


@given(TEXT, TEXT)
def test_a_continuation_is_what_it_adds_to_the_prompt(prompt: str, answer: str) -> None:
    for tokenizer in (BYTES, SPACES):
        ids = tokenizer.encode(prompt + answer)
        for cut_at in range(1, len(ids) + 1):
            before, after = (
                tokenizer.decode(ids[:cut_at]),
                Detokenizer(tokenizer, prompt_tail=ids[:cut_at]),
            )
            added = after.push(ids[cut_at:]) + after.finish()
            if "\ufffd" not in before:  # else the cut goes through a character
                assert before + added == tokenizer.decode(ids)
