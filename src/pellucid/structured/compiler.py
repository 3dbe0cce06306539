"""Compiles `StructuredOutputsParams` to a constraint. `llguidance` compiles JSON Schemas, regexes
and grammars, and computes which tokens may follow.

At each position the parser's state allows some byte strings. A mask over the vocabulary keeps the
tokens whose bytes continue one of them; sampling bans the others before it draws. So every complete
answer is valid.

All of this is untrusted input. Texts are bounded in length and depth, and the library gets limits
for the size of a grammar and for the work of one step. A grammar that exceeds them ends its own
request with an error.
"""

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..errors import ConfigError, PellucidError, RequestError
from ..sampling_params import SamplingParams
from ..structured_params import StructuredOutputsParams
from ..tokenizer import Tokenizer
from .grammar_constraint import GrammarConstraint

if TYPE_CHECKING:
    import llguidance

__all__ = ["GrammarCompiler"]

MAX_COMPILED = 64  # grammars that are kept
# a run of spaces and line breaks between the parts of JSON; some models would never end one
_WHITESPACE = r"[\x20\x0A\x0D\x09]{1,64}"
# a token of a large vocabulary takes some milliseconds at the most
_LIMITS = {
    "max_grammar_size": 200_000,
    "max_lexer_states": 50_000,
    "step_lexer_fuel": 100_000,
    "step_max_items": 20_000,
    "verbose_errors": False,
}
_SPECIAL = re.compile(r"[\\.+*?()|\[\]{}^$#&\-~/]")  # these have a meaning in a regex


class GrammarCompiler:
    """Compiles for one tokenizer, and caches the latest grammars. Any number of threads may use it.

    The library's own view of the vocabulary is built at the first call; it takes about a second for
    150,000 tokens.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # guards all fields below
        self._vocabulary: llguidance.LLTokenizer | None = None
        # by kind and text; the last used is at the end
        self._compiled: OrderedDict[tuple[str, str], GrammarConstraint] = OrderedDict()

    def constraint(self, params: SamplingParams) -> GrammarConstraint | None:
        """The constraint of a request; None if it has none."""
        wanted = params.structured_outputs
        return None if wanted is None else self.compile(wanted)

    def compile(self, params: StructuredOutputsParams) -> GrammarConstraint:
        """A new constraint. Raises RequestError for a text that is no valid schema, regex or
        grammar, and ConfigError if the library is not installed.
        """
        kind, text = params.kind_and_text()
        with self._lock:
            kept = self._compiled.get((kind, text))
            if kept is None:
                kept = self._compile(kind, text)
                self._compiled[kind, text] = kept
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
            else:
                self._compiled.move_to_end((kind, text))
            return kept.copy()

    def _compile(self, kind: str, text: str) -> GrammarConstraint:
        try:
            import llguidance
        except ImportError:
            raise ConfigError(
                "structured_outputs needs the package llguidance: pip install "
                "'pellucid[structured]'"
            ) from None
        try:
            grammar = _grammar(llguidance.LLMatcher, kind, text)
            if self._vocabulary is None:
                self._vocabulary = _build_vocabulary(self._tokenizer)
            matcher = llguidance.LLMatcher(
                self._vocabulary,
                grammar,
                log_level=0,
                limits=llguidance.LLParserLimits(**_LIMITS),  # type: ignore[arg-type]
            )
            reason = matcher.get_error() or _first_error(matcher)
        except BaseException as error:  # panics of the library are no Exceptions
            if isinstance(error, PellucidError | KeyboardInterrupt | SystemExit | MemoryError):
                raise
            reason = str(error)
        if reason:
            raise RequestError(
                f"structured_outputs.{kind} cannot be compiled: {' '.join(reason.split())[:300]}"
            )
        return GrammarConstraint(matcher, self._tokenizer.vocab_size, kind)


def _first_error(matcher: "llguidance.LLMatcher") -> str:
    """Why no answer can begin; empty if one can.

    The first mask may take a second, because it builds most of the lexer's states. They are kept
    with the compiled grammar. So it is computed here, while other requests run, and not in a step.
    """
    matcher.compute_bitmask()
    reason: str = matcher.get_error()
    return "no text matches it" if "NoExtensionBias" in reason else reason


def _grammar(library: "type[llguidance.LLMatcher]", kind: str, text: str) -> str:
    """The grammar in the library's format."""
    if kind in ("json", "json_object"):
        schema = json.loads(text)
        # an options' object within a schema would undo the limit on whitespace
        if isinstance(schema, Mapping) and "x-guidance" in schema:
            raise RequestError("structured_outputs.json has the key 'x-guidance'; it is not read")
        return library.grammar_from_json_schema(text, overrides={"whitespace_pattern": _WHITESPACE})
    if kind == "regex":
        return library.grammar_from_regex(text)
    if kind == "choice":
        choices = (_SPECIAL.sub(r"\\\g<0>", choice) for choice in json.loads(text))
        return library.grammar_from_regex("|".join(choices))
    # GBNF, as llama.cpp's, or Lark
    from llguidance.gbnf_to_lark import any_to_lark

    return library.grammar_from_lark(any_to_lark(text))


class _View:
    """The part of a tokenizer that the library reads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = min(tokenizer.eos_token_ids, default=0)
        self.bos_token_id = tokenizer.bos_token_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
        self.special_token_ids = sorted(tokenizer.special_token_ids | tokenizer.eos_token_ids)
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode(errors="replace")
        return self._encode(plain, add_special=False)


def _build_vocabulary(tokenizer: Tokenizer) -> "llguidance.LLTokenizer":
    """The library's view of a vocabulary: the bytes of each token."""
    import llguidance

    return llguidance.LLTokenizer(
        llguidance.TokenizerWrapper(_View(tokenizer)),
        n_vocab=tokenizer.vocab_size,
        eos_token=sorted(tokenizer.eos_token_ids) or None,
    )
