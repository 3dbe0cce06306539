"""How text is cut into words before byte-level BPE: one row per kind of vocabulary, by the name in
`tokenizer.ggml.pre`.

BPE never merges across the border of a word, so these borders decide which tokens are possible. A
pre-tokenizer is a list of regular expressions. Each one cuts the pieces that the previous one made:
a match is a piece, and so is the text between two matches. Some families compose text first (NFC).
GGUF files do not say so and llama.cpp does not do it, but the models were trained that way.

The expressions are those that the models' authors published with their vocabularies, and the names
are GGUF's. An unknown name is refused: with the wrong borders a model would run and answer badly.
SentencePiece vocabularies have no pre-tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from ..errors import UnsupportedError

if TYPE_CHECKING:
    import tokenizers

__all__ = [
    "PROBE",
    "PreTokenizer",
    "build_pretokenizer",
    "cut_probe",
    "find_pretokenizer",
    "get_pretokenizer",
]

# A text that every two kinds of words cut differently: scripts, marks, digits, contractions in
# both cases, signs, white space.
PROBE = (
    "Hello  world! We've don't I'LL she'd It's O'Brien\n\n \t x = 3.14159 + 1000000; // 42%\r\n"
    " \r\nÜnï\u0301cödé e\u0301 naïve HTMLParser camelCase 日本語のテキスト 한국어 Привет мир!"
    " مرحبا 你好，世界。 हिन्दी ไทย 🦙😶\u200d🌫️ ٣٤٥ ½ Ⅷ foo_bar(x)->y[0] == 'a' ? a/b /c //\n"
    "=+<>^~|$ ---\n\n\tend   \n   "
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one kind of byte-level BPE vocabulary cuts text, and its defaults for absent keys."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a whole word that is a token is not split by the merges
    add_bos: bool = False  # where the file does not say
    nfc: bool = False  # whether text is composed first (Unicode's normal form C)


def build_pretokenizer(pre: PreTokenizer) -> "tokenizers.pre_tokenizers.PreTokenizer":
    """The library's object that cuts text so, and writes bytes in GPT-2's letters."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def find_pretokenizer(pieces: list[str], *, ignore_merges: bool, nfc: bool, where: str) -> str:
    """The name of the pre-tokenizer that cuts `PROBE` into these pieces. It does not matter by
    which expressions. `where` names the file in messages.

    Raises UnsupportedError if there is none: llama.cpp would cut text otherwise.
    """
    for name, pre in _TABLE.items():
        if (pre.ignore_merges, pre.nfc) == (ignore_merges, nfc) and pieces == cut_probe(
            build_pretokenizer(pre)
        ):
            return name
    raise UnsupportedError(
        f"{where} cuts text into words in a way for which GGUF files have no name; those that have "
        f"one are {', '.join(sorted(_TABLE))}"
    )


def cut_probe(rust: "tokenizers.pre_tokenizers.PreTokenizer") -> list[str]:
    """The pieces that a pre-tokenizer cuts `PROBE` into."""
    return [piece for piece, _ in rust.pre_tokenize_str(PROBE)]


def get_pretokenizer(name: str) -> PreTokenizer:
    """The row called `name`. Raises UnsupportedError, with the known names, if there is none."""
    if name not in _TABLE:
        raise UnsupportedError(
            f"tokenizer.ggml.pre is {name[:80]!r}; known pre-tokenizers are "
            f"{', '.join(sorted(_TABLE))}"
        )
    return _TABLE[name]


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _tiktoken(numbers: str, letter: str = r"\p{L}", neither: str = r"\p{L}\p{N}") -> str:
    """GPT-4's expression and its variants: contractions in any case, a word with one sign before
    it, numbers, signs, spaces.
    """
    return (
        rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{numbers}| ?[^\s{neither}]+[\r\n]*"
        rf"|{_SPACES}"
    )


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# DeepSeek's first two vocabularies list the ranges of their letters: scripts with capitals.
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d"
    "\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5"
    "\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    "\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3"
    "\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d"
    "\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d"
    "\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    "\U0001e900-\U0001e943"
)
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_WIDE_SIGNS = "!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002"
_TRAILING = (
    # published without the look-behind, which changes no match and makes long runs of spaces take
    # linear time
    r"(?<!\s)\s+$"
)
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

_TABLE: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        # the meaning of GGUF files without a name
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        **dict.fromkeys(("gpt-2", "phi-2", "exaone4"), PreTokenizer((_GPT2,))),
        **dict.fromkeys(("mpt", "olmo"), PreTokenizer((_GPT2,), nfc=True)),  # GPT-NeoX's
        # GPT-2's with every digit a word of its own
        **dict.fromkeys(
            ("smollm", "starcoder", "refact", "codeshell"), PreTokenizer((r"\p{N}", _GPT2))
        ),
        "command-r": PreTokenizer((r"\p{N}", _GPT2), nfc=True),
        **dict.fromkeys(
            ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
            PreTokenizer((_tiktoken(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
        ),
        "dbrx": PreTokenizer((_tiktoken(r"\p{N}{1,3}"),)),
        "glm4": PreTokenizer((_tiktoken(r"\p{N}{1,3}"),), ignore_merges=True),
        **dict.fromkeys(
            ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"),
            PreTokenizer((_tiktoken(r"\p{N}"),), nfc=True),
        ),
        "qwen35": PreTokenizer(
            (_tiktoken(r"\p{N}", r"[\p{L}\p{M}]", r"\p{L}\p{M}\p{N}"),), nfc=True
        ),
        "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
        "deepseek-llm": PreTokenizer(
            (r"[\r\n]", rf"\s?[{_CASED}]+", rf"\s?[{_WIDE_SIGNS}]+", _TRAILING, _CJK, r"\p{N}+")
        ),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        "deepseek-v3": PreTokenizer(
            (
                r"\p{N}{1,3}",
                _HAN_KANA,
                _ASCII_SIGNS
                + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
                + _SPACES,
            )
        ),
    }
)
