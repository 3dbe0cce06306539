"""How text is cut into words before byte-level BPE: one row per kind of vocabulary, found by the name in `tokenizer.ggml.pre`.

One idea: BPE never merges across the border of a word, so the cut decides which tokens are possible. A pre-tokenizer is a list of regular
expressions. Each cuts the pieces that the one before has left; a match is a piece, and so is what lies between two matches.

The expressions are those that the models' authors published with their vocabularies, and names are GGUF's. What is not in the table is
refused: a text cut in the wrong places gives a model that runs and answers badly. SentencePiece vocabularies have no pre-tokenizer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..errors import UnsupportedError

__all__ = ["PreTokenizer", "get_pretokenizer"]


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How one kind of byte-level BPE vocabulary cuts text, and what its files leave unsaid."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever the merges say
    add_bos: bool = False  # where the file does not say


def get_pretokenizer(name: str) -> PreTokenizer:
    """The row called `name`; an error that lists the known names where there is none."""
    if name not in _TABLE:
        raise UnsupportedError(f"tokenizer.ggml.pre is {name[:80]!r}; known pre-tokenizers are {', '.join(sorted(_TABLE))}")
    return _TABLE[name]


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _tiktoken(numbers: str, letter: str = r"\p{L}", neither: str = r"\p{L}\p{N}") -> str:
    """The family of GPT-4's expression: contractions in any case, a word with the one sign before it, numbers, signs, spaces."""
    return rf"(?:{_CONTRACTION})|[^\r\n\p{{L}}\p{{N}}]?{letter}+|{numbers}| ?[^\s{neither}]+[\r\n]*|{_SPACES}"


_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)

# DeepSeek's first two vocabularies list their letters one range after the other: the scripts that know capitals.
_CASED = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼ"
    "ℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_CJK = "[一-龥ࠀ-一가-퟿]+"
_KANJI_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_ASCII_SIGNS = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"

_TABLE: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        # what GGUF files without a name mean
        "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
        **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), PreTokenizer((_GPT2,))),
        # GPT-2's with every digit a word of its own
        **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), PreTokenizer((r"\p{N}", _GPT2))),
        **dict.fromkeys(
            ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
            PreTokenizer((_tiktoken(r"\p{N}{1,3}"),), ignore_merges=True, add_bos=True),
        ),
        "dbrx": PreTokenizer((_tiktoken(r"\p{N}{1,3}"),)),
        "glm4": PreTokenizer((_tiktoken(r"\p{N}{1,3}"),), ignore_merges=True),
        **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), PreTokenizer((_tiktoken(r"\p{N}"),))),
        "qwen35": PreTokenizer((_tiktoken(r"\p{N}", r"[\p{L}\p{M}]", r"\p{L}\p{M}\p{N}"),)),
        "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
        "deepseek-llm": PreTokenizer((r"[\r\n]", rf"\s?[{_CASED}]+", r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _CJK, r"\p{N}+")),
        "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
        "deepseek-v3": PreTokenizer(
            (
                r"\p{N}{1,3}",
                _KANJI_KANA,
                _ASCII_SIGNS + r"[A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
            )
        ),
    }
)
