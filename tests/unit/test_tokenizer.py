"""Encoding and decoding with small vocabularies, against the algorithms by their definitions
(tokenizer_vocabularies.py).
"""

import logging
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pellucid.errors import FormatError, RequestError, UnsupportedError
from pellucid.tokenizer import Tokenizer
from pellucid.tokenizer.from_gguf import from_gguf
from pellucid.tokenizer.pretokenizers import get_pretokenizer

from .tokenizer_vocabularies import (
    CONTROLS,
    LETTERS,
    MERGES,
    PIECES,
    byte_level,
    join_pieces,
    merge_word,
    sentencepiece,
)

BYTES = from_gguf(byte_level())
SPACES = from_gguf(sentencepiece())
NO_PREFIX = from_gguf(sentencepiece(add_space_prefix=False))
LOOK_ALIKES = st.sampled_from(
    [*CONTROLS, "<s>", "</s>", "<unk>", "<|im_end", "|>", "<tool>", "<0x41>", "[PAD]", "\n\n"]
)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
NASTY = st.lists(UNICODE | LOOK_ALIKES, max_size=6).map("".join)


def id_of(tokenizer: Tokenizer, text: str) -> int:
    return next(i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == text)


# ---- byte-level BPE


@given(st.text("hello wrd's12é😀abc\n\t._-", max_size=40))
@example("hello world's hello  world   ababab 12 é😀\n\n x")
def test_byte_level_ids_are_those_of_the_definition(text: str) -> None:
    metadata = byte_level()
    words = re.findall(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+", text
    )
    assert "".join(words) == text
    written = ["".join(LETTERS[byte] for byte in word.encode()) for word in words]
    assert BYTES.encode(text) == [
        i for word in written for i in merge_word(word, MERGES, metadata["tokenizer.ggml.tokens"])
    ]


@given(NASTY)
def test_decoding_gives_any_text_back(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text
    if "▁" not in text:
        assert NO_PREFIX.decode(NO_PREFIX.encode(text)) == text
        if "\n\n" not in text:  # after which, as at the beginning, this vocabulary puts a space
            assert SPACES.decode(SPACES.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", "I|'|M| you|'re| 12345½|!?|\n\n| a"),
        ("smollm", "I|'|M| you|'re| |1|2|3|4|5|½|!?|\n\n| a"),
        ("llama-bpe", "I|'M| you|'re| |123|45½|!?\n\n| a"),
        ("qwen2", "I|'M| you|'re| |1|2|3|4|5|½|!?\n\n| a"),
        ("tekken", "I|'M| you|'re| |1|2|3|4|5|½|!?\n\n| a"),
        ("deepseek-llm", "I|'|M| you|'|re| |12345½|!?|\n|\n| a"),
        ("deepseek-v3", "I|'M| you|'re| |123|45½|!?\n\n| a"),
        ("default", "I|'|M| you|'|re| |123|45½|!?|\n\n| a"),
    ],
)
def test_a_pretokenizer_cuts_as_its_models_do(pre: str, words: str) -> None:
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated")
            for pattern in get_pretokenizer(pre).patterns
        ]
    )
    assert "|".join(word for word, _ in cut.pre_tokenize_str("I'M you're 12345½!?\n\n a")) == words


def test_a_word_that_is_a_token_needs_no_merges_where_the_vocabulary_says_so() -> None:
    tokens = [*byte_level()["tokenizer.ggml.tokens"][:-1], "xyz"]
    kinds = [*byte_level()["tokenizer.ggml.token_type"][:-1], 1]
    ids = {
        pre: from_gguf(byte_level(pre=pre, tokens=tokens, token_type=kinds)).encode(
            "xyz", add_special=False
        )
        for pre in ("llama-bpe", "qwen2")
    }
    assert ids == {
        "llama-bpe": [len(tokens) - 1],
        "qwen2": [tokens.index(letter) for letter in "xyz"],
    }


def test_a_byte_that_the_vocabulary_lacks_is_left_out_with_a_log_entry(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = byte_level()
    tokens = [
        text if text != LETTERS[4] else "nothing" for text in metadata["tokenizer.ggml.tokens"]
    ]
    tokenizer = from_gguf(byte_level(tokens=tokens))
    with caplog.at_level(logging.WARNING):
        assert tokenizer.decode(tokenizer.encode("a\x05b")) == "a\x05b"
        assert not caplog.records
        assert tokenizer.decode(tokenizer.encode("a\x04b\x04")) == "ab"
    assert "0x04" in caplog.text


# ---- SentencePiece


@given(st.text("abc helo é\n😀", max_size=30))
@example("hello hello  hello   abcabc 😀 \n\n\n é")
@example("aabbcc" * 5)
def test_sentencepiece_ids_are_those_of_the_definition(text: str) -> None:
    metadata = sentencepiece()
    tokens, scores, kinds = (
        metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")
    )
    expected = [1]
    for fragment in re.split("(\n\n)", text):
        if fragment == "\n\n":
            expected.append(tokens.index("\n\n"))
        elif fragment:
            expected += join_pieces("▁" + fragment.replace(" ", "▁"), tokens, scores, kinds)
    assert SPACES.encode(text) == expected


@given(st.data())
def test_scores_rule_whatever_the_vocabulary(data: st.DataObject) -> None:
    """Pieces and scores are drawn, so most vocabularies are such as no training would give."""
    letters = "ab▁"
    pieces = [
        *letters,
        *data.draw(st.lists(st.text(letters, min_size=2, max_size=6), unique=True, max_size=25)),
    ]
    scores = [-float(rank) for rank in data.draw(st.permutations(range(len(pieces))))]
    metadata = sentencepiece(pieces, scores, add_space_prefix=False, add_bos_token=False)
    text = data.draw(st.text("ab ", min_size=1, max_size=24))
    tokens, all_scores, kinds = (
        metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")
    )
    assert from_gguf(metadata).encode(text) == join_pieces(
        text.replace(" ", "▁"), tokens, all_scores, kinds
    )


@pytest.mark.parametrize(
    "runs", [(2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11, 15), (2, 3), (3, 2, 5)]
)
def test_runs_of_spaces_with_equal_scores_grow_from_the_left(runs: tuple[int, ...]) -> None:
    """The first is Llama 2's vocabulary, where the runs of 2 to 16 spaces all have the score
    -1e9.
    """
    metadata = sentencepiece(
        ["▁", "a", *("▁" * n for n in runs)],
        [-1.0, -2.0] + [-1e9] * len(runs),
        add_space_prefix=False,
        add_bos_token=False,
    )
    tokenizer = from_gguf(metadata)
    tokens, scores, kinds = (
        metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")
    )
    for n in range(1, 70):
        text = "a" + " " * n + "a"
        assert tokenizer.encode(text) == join_pieces(
            text.replace(" ", "▁"), tokens, scores, kinds
        ), n


def test_a_text_begins_with_a_space_where_the_vocabulary_wants_it() -> None:
    assert [SPACES.token_text(i) for i in SPACES.encode("hello", add_special=False)] == [" hello"]
    assert [NO_PREFIX.token_text(i) for i in NO_PREFIX.encode("hello", add_special=False)] == [
        "hello"
    ]
    assert SPACES.decode(SPACES.encode("  hello")) == "  hello"
    assert SPACES.encode("") == [1]
    assert SPACES.encode("", add_special=False) == []


# ---- special tokens


@given(NASTY)
def test_plain_text_never_becomes_a_control_token(text: str) -> None:
    for tokenizer in (BYTES, SPACES, NO_PREFIX):
        assert tokenizer.special_token_ids.isdisjoint(tokenizer.encode(text, add_special=False))


def test_trusted_text_names_control_tokens() -> None:
    text = "hello<|im_end|><|im_start|>x"
    end, start = id_of(BYTES, "<|im_end|>"), id_of(BYTES, "<|im_start|>")
    assert BYTES.encode(text, parse_special=True) == [
        *BYTES.encode("hello"),
        end,
        start,
        *BYTES.encode("x"),
    ]
    assert BYTES.decode(BYTES.encode(text, parse_special=True)) == "hellox"
    assert BYTES.decode(BYTES.encode(text, parse_special=True), skip_special=False) == text
    assert SPACES.encode("ab</s>", add_special=False, parse_special=True) == [
        *SPACES.encode("ab", add_special=False),
        2,
    ]


def test_tokens_of_fixed_text_are_found_in_plain_text_too() -> None:
    assert BYTES.encode("a<tool>b") == [
        *BYTES.encode("a"),
        id_of(BYTES, "<tool>"),
        *BYTES.encode("b"),
    ]
    assert BYTES.decode(BYTES.encode("a<tool>b")) == "a<tool>b"


def test_no_merge_makes_a_control_token() -> None:
    end = id_of(BYTES, "<|im_end|>")
    tokens, kinds = (
        list(byte_level()["tokenizer.ggml.tokens"]),
        list(byte_level()["tokenizer.ggml.token_type"]),
    )
    tokens[end] = "hel"
    tokenizer = from_gguf(byte_level(tokens=tokens, token_type=kinds, merges=["he l", *MERGES]))
    assert end not in tokenizer.encode("hel hello", add_special=False)
    assert tokenizer.encode("hel", parse_special=True) == [end]
    pieces = [*PIECES, "<s", "s", ">", "<"]
    tokenizer = from_gguf(sentencepiece(pieces))
    assert 1 not in tokenizer.encode("<s>", add_special=False)


def test_what_stands_around_a_text() -> None:
    start, end = BYTES.bos_token_id, id_of(BYTES, "<|im_end|>")
    around = from_gguf(byte_level(add_bos_token=True, add_eos_token=True))
    assert around.encode("x") == [start, *BYTES.encode("x"), end]
    assert around.encode("x", add_special=False) == BYTES.encode("x")
    assert (around.add_bos, BYTES.add_bos) == (True, False)
    # what these vocabularies do if the file does not say
    assert from_gguf(byte_level(pre="llama-bpe", add_bos_token=None)).add_bos
    assert not from_gguf(byte_level(add_bos_token=None)).add_bos
    assert not from_gguf(byte_level(add_bos_token=True, bos_token_id=None)).add_bos


def test_ends_of_an_answer_are_known_by_id_and_by_name_of_control_tokens() -> None:
    assert BYTES.eos_token_ids == {id_of(BYTES, "<|im_end|>"), id_of(BYTES, "<|end|>")}
    tool = id_of(BYTES, "<tool>")
    assert tool in from_gguf(byte_level(eot_token_id=tool)).eos_token_ids
    assert tool in from_gguf(byte_level(eom_token_id=tool)).eos_token_ids
    tokens = [
        text if text != "<tool>" else "</s>" for text in byte_level()["tokenizer.ggml.tokens"]
    ]
    # "</s>" of fixed text may be a tag of HTML
    assert tool not in from_gguf(byte_level(tokens=tokens)).eos_token_ids
    assert SPACES.eos_token_ids == {2}


def test_harmony_ends_an_answer_with_return_or_call_and_a_part_of_it_with_end() -> None:
    tokens = [*byte_level()["tokenizer.ggml.tokens"], "<|return|>", "<|call|>"]
    kinds = [*byte_level()["tokenizer.ggml.token_type"], 3, 3]
    tokenizer = from_gguf(byte_level(tokens=tokens, token_type=kinds, eos_token_id=len(tokens) - 2))
    assert {tokenizer.token_text(i) for i in tokenizer.eos_token_ids} == {
        "<|return|>",
        "<|call|>",
        "<|im_end|>",
    }


# ---- ids and bytes


def test_bytes_of_tokens() -> None:
    assert BYTES.token_bytes(id_of(BYTES, " world")) == b" world"
    assert BYTES.token_bytes(0xE9) == b"\xe9"
    assert BYTES.token_text(0xE9) == "\ufffd"
    assert SPACES.token_bytes(3 + 0xE9) == b"\xe9"
    assert BYTES.token_bytes(id_of(BYTES, "<|im_end|>")) == b"<|im_end|>"
    assert BYTES.token_bytes(BYTES.vocab_size - 1) == b""  # an unused token
    # a row with which a model pads its embedding
    assert BYTES.token_bytes(BYTES.vocab_size + 100) == b""
    with pytest.raises(RequestError, match="-1"):
        BYTES.token_bytes(-1)


@given(st.lists(st.integers(0, BYTES.vocab_size - 1), max_size=20))
def test_any_ids_decode_as_their_bytes_do(ids: list[int]) -> None:
    data = b"".join(BYTES.token_bytes(i) for i in ids)
    assert BYTES.decode(ids, skip_special=False) == data.decode(errors="replace")


def test_text_that_is_not_unicode_is_refused_with_its_place() -> None:
    with pytest.raises(RequestError, match=r"U\+D83D at character 3"):
        BYTES.encode("abc\ud83d")
    with pytest.raises(RequestError, match="surrogate"):
        SPACES.encode(b"\xff".decode(errors="surrogateescape"))


# ---- metadata that is wrong


def tokens_with(place: int, text: Any) -> list[Any]:
    tokens = list(byte_level()["tokenizer.ggml.tokens"])
    tokens[place] = text
    return tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": None}, "tokens must be a list of str"),
        ({"tokens": []}, "0 tokens"),
        ({"tokens": "abc"}, "tokens must be a list"),
        ({"tokens": tokens_with(5, 5)}, "tokens must be a list of str"),
        ({"tokens": tokens_with(5, "a")}, "'a' twice"),
        ({"tokens": tokens_with(5, "x" * 2000)}, "2000 characters"),
        ({"tokens": tokens_with(-1, "\ud800")}, "not Unicode"),
        ({"token_type": [1, 2, 3]}, "token_type has 3 entries"),
        ({"token_type": [7] * len(byte_level()["tokenizer.ggml.tokens"])}, "token_type holds 7"),
        ({"token_type": [-1] * len(byte_level()["tokenizer.ggml.tokens"])}, "token_type holds -1"),
        ({"merges": None}, "merges must be a list"),
        ({"merges": [1]}, "merges must be a list of str"),
        ({"merges": ["h e", "he"]}, "not two tokens"),
        ({"merges": ["h e", " he"]}, "not two tokens"),
        ({"merges": ["q q"]}, "merges"),
        ({"merges": ["hello nowhere"]}, "merges"),
        ({"eos_token_id": 10_000}, "eos_token_id is 10000"),
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": True}, "bos_token_id is True"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"eot_token_id": 1.5}, "eot_token_id is 1.5"),
        ({"add_bos_token": 1}, "add_bos_token is 1"),
        ({"model": 5}, "model is 5"),
        ({"pre": ["gpt-2"]}, "pre is"),
    ],
)
def test_wrong_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        from_gguf(byte_level(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": ["a", "\ud800"], "token_type": [1, 1], "scores": [0.0, 0.0]}, "not Unicode"),
        ({"scores": None}, "scores must be a list"),
        ({"scores": [1.0]}, "scores has 1 entries"),
        ({"scores": [float("nan")] * 282}, "scores"),
        ({"scores": ["a"] * 282}, "scores must be a list"),
        ({"add_space_prefix": "yes"}, "add_space_prefix is 'yes'"),
        ({"unknown_token_id": 999}, "unknown_token_id is 999"),
    ],
)
def test_wrong_metadata_of_sentencepiece_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        from_gguf(sentencepiece(**changes))


def test_a_vocabulary_that_cannot_write_some_text_is_refused() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.scores": [0.0, 1.0],
    }
    with pytest.raises(FormatError, match="neither a token for each byte"):
        from_gguf(metadata)
    unknown = from_gguf(
        metadata | {"tokenizer.ggml.token_type": [2, 1], "tokenizer.ggml.add_space_prefix": False}
    )
    assert unknown.encode("bxb") == [1, 0, 1]


def test_the_smallest_vocabularies_encode() -> None:
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>"],
        "tokenizer.ggml.scores": [0.0],
    }
    assert from_gguf(metadata | {"tokenizer.ggml.token_type": [2]}).encode("hello") == [0]
    letters = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        "tokenizer.ggml.merges": [],
    }
    assert from_gguf(letters).encode("abba") == [0, 1, 1, 0]


def test_empty_tokens_are_named_apart() -> None:
    tokens = list(byte_level()["tokenizer.ggml.tokens"])
    kinds = [*byte_level()["tokenizer.ggml.token_type"], 5, 5]
    assert (
        from_gguf(byte_level(tokens=[*tokens, "", ""], token_type=kinds)).vocab_size
        == len(tokens) + 2
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "bert"}, "'gpt2'.*'llama'"), ({"pre": "no-such"}, "'no-such'.*gpt-2.*qwen2")],
)
def test_what_is_not_built_is_said_with_what_is(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        from_gguf(byte_level(**changes))


@pytest.mark.parametrize(
    ("pre", "composes"),
    [
        ("qwen2", True),
        ("qwen35", True),
        ("deepseek-r1-qwen", True),
        ("stablelm2", True),
        ("command-r", True),
        ("olmo", True),
        ("mpt", True),
        ("gpt-2", False),
        ("llama-bpe", False),
        ("smollm", False),
        ("tekken", False),
    ],
)
def test_text_is_composed_for_families_that_were_trained_so(pre: str, composes: bool) -> None:
    """As their tokenizer.json says (NFC), which a GGUF file does not repeat."""
    tokenizer = from_gguf(byte_level(pre=pre))
    decomposed, composed = "cafe\u0301", "caf\u00e9"
    assert (tokenizer.encode(decomposed) == tokenizer.encode(composed)) is composes
    assert tokenizer.decode(tokenizer.encode(decomposed)) == (composed if composes else decomposed)


def test_special_tokens_of_phi3_take_in_the_white_space_after_them() -> None:
    """As its tokenizer.json says (rstrip), and llama.cpp knows by the name of the model."""
    plain = from_gguf(byte_level())
    phi = from_gguf(byte_level() | {"general.name": "Phi-3 mini"})
    text = "<|end|>\n\n a<|im_end|> <tool>  b"
    ids = phi.encode(text, parse_special=True)
    assert ids == plain.encode("<|end|>a<|im_end|><tool>b", parse_special=True)
    assert len(plain.encode(text, parse_special=True)) > len(ids)
