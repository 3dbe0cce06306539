"""Tokenizers from a folder: the same ids and texts as transformers, whatever the configs say, and
clear errors.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as RustTokenizer

from pellucid.errors import FormatError, UnsupportedError
from pellucid.tokenizer import Tokenizer, load_tokenizer
from pellucid.tokenizer.from_folder import from_folder

TRAINING = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    "def f(x):\n    return x + 1\n",
    "ünïcode é 12345 😀 世界",
] * 3
TEXTS = [
    "",
    " ",
    "The quick dog",
    "  spaces   and\n\n\nlines\t",
    "I'm 12 é 😀 世界 \x00\x7f \ufffd",
    "a<s>b</s> <tool> <unk> <|x|>",
    "▁a ▁▁b",
    "x" * 300,
    "한국어 עברית",
]


def byte_level() -> RustTokenizer:
    """As Qwen's: a normalizer, a regular expression, bytes; token 0 and 1 are special, <tool> is
    not.
    """
    rust = RustTokenizer(models.BPE())
    rust.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    rust.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    rust.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False),
    )
    rust.add_special_tokens(
        [AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False)]
    )
    rust.add_tokens([AddedToken("<tool>", normalized=False)])
    return rust


def sentencepiece(prefix: bool = True) -> RustTokenizer:
    """As Llama 2's: spaces are ▁, bytes are tokens, a text begins with a space and with <s>."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = RustTokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    )
    state = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    rust = RustTokenizer(
        models.BPE(
            vocab=state["vocab"],
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    rust.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    )
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    rust.add_special_tokens([AddedToken(text, normalized=False) for text in special[:3]])
    rust.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return rust


Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """save(rust, tokenizer_config={…}, …) -> the folder with tokenizer.json and the named
    configs.
    """

    def write(rust: RustTokenizer | None, **configs: Any) -> Path:
        if rust is not None:
            rust.save(str(tmp_path / "tokenizer.json"))
        for name, value in configs.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    "build",
    [byte_level, sentencepiece, lambda: sentencepiece(prefix=False)],
    ids=["bytes", "spaces", "no prefix"],
)
def test_ids_and_texts_are_those_of_transformers(
    build: Callable[[], RustTokenizer], save: Save
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        folder = save(build(), tokenizer_config=NAMES)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = from_folder(folder)
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == theirs.encode(text), text
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"], text
        ids = ours.encode(text, parse_special=True)
        for skip in (True, False):
            assert ours.decode(ids, skip_special=skip) == theirs.decode(
                ids, skip_special_tokens=skip
            ), text
    assert (ours.vocab_size, ours.bos_token_id) == (len(theirs), theirs.bos_token_id)
    assert ours.eos_token_ids == {theirs.eos_token_id}


def test_plain_text_never_becomes_a_special_token(save: Save) -> None:
    tokenizer = from_folder(save(byte_level(), tokenizer_config=NAMES))
    for text in TEXTS:
        assert tokenizer.special_token_ids.isdisjoint(tokenizer.encode(text, add_special=False))


def test_truncation_and_padding_of_the_file_are_not_applied(save: Save) -> None:
    rust = byte_level()
    rust.enable_truncation(4)
    rust.enable_padding(length=64)
    tokenizer = from_folder(save(rust))
    assert tokenizer.decode(tokenizer.encode("The quick brown fox")) == "The quick brown fox"


def test_special_tokens_are_named_by_any_of_the_configs(save: Save) -> None:
    rust = byte_level()
    bos, eos, tool = (rust.token_to_id(text) for text in ("<s>", "</s>", "<tool>"))

    def of(**configs: Any) -> Tokenizer:
        return from_folder(
            save(
                rust, **({"tokenizer_config": {}, "generation_config": {}, "config": {}} | configs)
            )
        )

    assert (of().bos_token_id, of().eos_token_ids) == (None, frozenset())
    named = of(
        tokenizer_config={"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>"}
    )
    assert (named.bos_token_id, named.eos_token_ids) == (bos, frozenset([eos]))
    both = of(
        tokenizer_config={"eos_token": "</s>"},
        generation_config={"eos_token_id": [tool], "bos_token_id": bos},
    )
    assert (both.bos_token_id, both.eos_token_ids) == (bos, frozenset([eos, tool]))
    assert of(config={"eos_token_id": eos, "bos_token_id": bos}).eos_token_ids == {eos}
    assert of(
        config={"eos_token_id": eos}, generation_config={"eos_token_id": [tool, bos]}
    ).eos_token_ids == {tool, bos}
    assert not named.add_bos
    assert of(tokenizer_config={"bos_token": "<s>", "add_bos_token": True}).add_bos


def test_what_stands_around_a_text_is_said_by_the_file_and_where_it_is_silent_by_the_config(
    save: Save,
) -> None:
    def around(rust: RustTokenizer, **config: bool) -> list[int]:
        return from_folder(save(rust, tokenizer_config=NAMES | config)).encode("")

    assert around(byte_level()) == []
    assert around(byte_level(), add_bos_token=True) == [byte_level().token_to_id("<s>")]
    assert around(sentencepiece()) == around(sentencepiece(), add_bos_token=True) == [1]
    both = sentencepiece()
    both.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert around(both) == [1, 2]


def test_chat_templates_are_found_where_they_are(save: Save) -> None:
    messages = [{"role": "user", "content": "hi"}]
    config = NAMES | {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    folder = save(byte_level(), tokenizer_config=config)
    assert load_tokenizer(folder).apply_chat_template(messages) == "<s>hi"
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "tools {{ tools | length }}"},
    ]
    folder = save(None, tokenizer_config=NAMES | {"chat_template": named})
    assert from_folder(folder).apply_chat_template(messages) == "plain"
    assert (
        from_folder(folder).apply_chat_template(messages, tools=[{"type": "function"}]) == "tools 1"
    )
    (folder / "chat_template.jinja").write_text("file{{ eos_token }}")
    assert from_folder(folder).apply_chat_template(messages) == "file</s>"
    assert from_folder(folder).chat_template == "file{{ eos_token }}"


def test_additional_chat_templates_are_found_by_their_names(save: Save) -> None:
    messages = [{"role": "user", "content": "hi"}]
    named = [{"name": "default", "template": "plain"}, {"name": "rag", "template": "old"}]
    folder = save(byte_level(), tokenizer_config=NAMES | {"chat_template": named})
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "rag.jinja").write_text("rag {{ messages[0].content }}")
    (more / "tool_use.jinja").write_text("tools")
    (more / "notes.txt").write_text("no template")
    tokenizer = from_folder(folder)
    assert tokenizer.apply_chat_template(messages) == "plain"
    assert tokenizer.apply_chat_template(messages, chat_template="rag") == "rag hi"
    assert tokenizer.apply_chat_template(messages, tools=[{"type": "function"}]) == "tools"

    for i in range(1000):
        (more / f"{i}.jinja").write_text("x")
    with pytest.raises(FormatError, match="chat templates; it may have at most"):
        from_folder(folder)


def test_additional_chat_templates_out_of_the_folder_are_not_read(
    save: Save, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, outside = save(byte_level()), tmp_path_factory.mktemp("outside")
    (outside / "secret.jinja").write_text("secret")
    (folder / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(FormatError, match=r"secret.jinja leads to .* outside the model's folder"):
        from_folder(folder)


NO_TOKENS: list[Any] = [5, True, ["</s>"], {}, {"content": None}, {"content": 5}]
NO_FLAGS: list[Any] = ["yes", 1, []]


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ({"tokenizer_config": {"eos_token": "<nowhere>"}}, "eos_token is '<nowhere>'"),
        ({"tokenizer_config": [1]}, "holds a list"),
        *(
            (
                {"tokenizer_config": {key: value}},
                rf"tokenizer_config.json: {key} is .*must be a text",
            )
            for key in ("bos_token", "eos_token", "unk_token", "pad_token")
            for value in NO_TOKENS
        ),
        *(
            (
                {"tokenizer_config": {"bos_token": "<s>", "add_bos_token": value}},
                "add_bos_token is .* true or false",
            )
            for value in NO_FLAGS
        ),
        (
            {"tokenizer_config": {"eos_token": "\ud800"}},
            "tokenizer_config.json has a text with half",
        ),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id is '2'"),
        ({"generation_config": {"eos_token_id": [1, True]}}, "eos_token_id is"),
        ({"generation_config": {"eos_token_id": -1}}, "eos_token_id is -1"),
        ({"generation_config": {"eos_token_id": 5000}}, "has the id 5000"),
        ({"tokenizer_config": {"chat_template": 5}}, "chat_template must be"),
        ({"tokenizer_config": {"chat_template": "x" * 300_000}}, "300000 characters"),
    ],
)
def test_wrong_configs_are_named(configs: dict[str, Any], message: str, save: Save) -> None:
    with pytest.raises(FormatError, match=message):
        from_folder(save(byte_level(), **configs))


def test_a_special_token_that_is_null_is_none(save: Save) -> None:
    config = {"bos_token": None, "pad_token": None, "add_bos_token": None}
    assert from_folder(save(byte_level(), tokenizer_config=config)).bos_token_id is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"version": "1.0"}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        from_folder(tmp_path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, save: Save) -> None:
    with pytest.raises(FormatError, match=r"tokenizer\.json cannot be read: No such file"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="can't decode byte 0xff"):
        from_folder(tmp_path)
    folder = save(byte_level())
    (folder / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"tokenizer_config\.json is not a JSON object"):
        from_folder(folder)


def test_ids_beyond_any_vocabulary_are_refused(save: Save) -> None:
    state = json.loads(byte_level().to_str())
    state["model"]["vocab"]["far"] = 4_000_000_000
    folder = save(None)
    (folder / "tokenizer.json").write_text(json.dumps(state))
    with pytest.raises(FormatError, match="4000000000"):
        from_folder(folder)


def test_an_expression_that_would_give_up_on_a_text_is_refused(save: Save) -> None:
    rust = byte_level()
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"(a*)*b\1c"), "isolated"), pre_tokenizers.ByteLevel()]
    )
    with pytest.raises(UnsupportedError, match="is not known to take time in proportion"):
        from_folder(save(rust))


def test_ways_to_decode_that_are_not_known_are_refused(save: Save) -> None:
    rust = byte_level()
    rust.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match="WordPiece"):
        from_folder(save(rust))


def added(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "normalized": False, "special": True} | flags


def test_tokens_that_stand_only_in_added_tokens_decoder_are_added(save: Save) -> None:
    rust = byte_level()
    size = rust.get_vocab_size()
    folder = save(
        rust,
        tokenizer_config={
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "0": added("!"),  # one that is there already
                str(size + 1): added("<|im_end|>"),
                str(size): added("<|im_start|>"),
            },
        },
    )
    tokenizer = from_folder(folder)
    assert tokenizer.eos_token_ids == {size + 1} and tokenizer.vocab_size == size + 2
    assert tokenizer.encode("a<|im_start|>", parse_special=True)[-1] == size
    assert size not in tokenizer.encode("a<|im_start|>")


def test_an_end_that_no_file_names_is_found_by_its_name(save: Save) -> None:
    rust = byte_level()
    size = rust.get_vocab_size()
    config = {"added_tokens_decoder": {str(size): added("<|im_end|>")}}
    assert from_folder(save(rust, tokenizer_config=config)).eos_token_ids >= {size}


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ([1], "added_tokens_decoder is .* it must be an object"),
        ({"x": added("<a>")}, "has the key 'x'; it must be a token id"),
        ({"9999999999": added("<a>")}, "has the key '9999999999'"),
        ({"999999": added("<a>")}, "gives '<a>' the id 999999; the next id"),
        ({"5": {"special": True}}, "content is None"),
        ({"5": 7}, "is 7; it must be an object"),
        ({"5": added("x" * 5000)}, "has a token of 5000 characters"),
        ({"5": added("<a>") | {"lstrip": "yes"}}, "lstrip is 'yes'"),
    ],
)
def test_wrong_added_tokens_decoders_are_named(decoder: Any, message: str, save: Save) -> None:
    with pytest.raises(FormatError, match=message):
        from_folder(save(byte_level(), tokenizer_config={"added_tokens_decoder": decoder}))
