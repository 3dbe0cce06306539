"""Text to token ids and back, for one model: encode, decode, the bytes of a token, its chat
template.

The `tokenizers` library (Rust) cuts text into ids, and nothing else. Ids become text here, as the
bytes of each token one after the other (`vocabulary.py`). So decoding costs the same per token
whatever came before, and streaming uses the same function.

The caller chooses, per call, whether text may name control tokens. With `parse_special=False`
"<|im_end|>" is plain text. With `parse_special=True` it is the token; in a prompt from a chat
template, only if the template itself wrote it (`rendered.py`). Other tokens with a fixed text
(Gemma's runs of newlines) are found in both cases.

Text that is not Unicode (a lone surrogate) is refused, not replaced. A Tokenizer does not change,
so one serves all threads.
"""

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ..errors import FormatError, PellucidError, PromptTooLongError, RequestError
from .chat_template import ChatTemplate
from .rendered import RenderedEncoder, tokenizer_like
from .traced_text import TracedText
from .vocabulary import TokenKind, Vocabulary, byte_letters

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer", "library_errors"]

_log = logging.getLogger(__name__)

_LONG_TEXT = 1 << 15  # characters: hundredths of a second
_MAX_SHRINKING = 4  # how many times shorter a normalizer may make a text; NFC makes it a third
_UNKNOWN_CHARS = 64  # characters that one unknown token stands for


class Tokenizer:
    """Built by `from_gguf` or `from_folder`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        rust: "tokenizers.Tokenizer",
        *,
        bos_token_id: int | None,
        eos_token_ids: frozenset[int],
        prefix_ids: tuple[int, ...] = (),
        suffix_ids: tuple[int, ...] = (),
        strips_leading_space: bool = False,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        """`rust` encodes plain text to ids of `vocabulary`. Its added tokens are the tokens with a
        fixed text, special or not.

        `prefix_ids` and `suffix_ids` are put around a whole text (`add_special`).
        `strips_leading_space`: encoding puts a space before the text, so decoding takes one away.
        """
        for token_id in (
            *prefix_ids,
            *suffix_ids,
            *eos_token_ids,
            *(() if bos_token_id is None else (bos_token_id,)),
        ):
            if not 0 <= token_id < len(vocabulary.tokens):
                raise FormatError(
                    f"a special token has the id {token_id}; ids go from 0 to "
                    f"{len(vocabulary.tokens) - 1}"
                )
        self.vocab_size = len(vocabulary.tokens)
        self.bos_token_id = bos_token_id
        self.eos_token_ids = eos_token_ids
        self.add_bos = bos_token_id is not None and bos_token_id in prefix_ids
        # the tokens that `skip_special` leaves out
        self.special_token_ids = frozenset(vocabulary.ids_of(TokenKind.CONTROL, TokenKind.UNKNOWN))
        self.strips_leading_space = strips_leading_space
        self.vocabulary = vocabulary
        self._prefix, self._suffix = prefix_ids, suffix_ids
        self._trusting, self._plain = rust, _without_special_tokens(rust)
        self._known_bytes = _known_bytes(vocabulary)
        self._chat_template = chat_template or ChatTemplate({}, {})

    @functools.cached_property
    def text_vocab_size(self) -> int:
        """One more than the highest id that plain text, or the tokens around every text, may have.
        Special tokens, added tokens and padding may lie above it. A model may have no embedding for
        those: Gemma 3's text models have none for the image token.
        """
        plain = self.vocabulary.ids_of(TokenKind.NORMAL, TokenKind.BYTE)
        return 1 + max(*plain[-1:], *self._prefix, *self._suffix, -1, -1)

    @functools.cached_property
    def _rendered(self) -> RenderedEncoder:
        return RenderedEncoder(self._trusting)

    @property
    def rust(self) -> "tokenizers.Tokenizer":
        """The library's object that cuts text, with tokens of a fixed text. Not to be changed."""
        return self._trusting

    @property
    def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The ids that are put before and after a whole text."""
        return self._prefix, self._suffix

    @property
    def templates(self) -> ChatTemplate:
        """The model's chat templates and the names of its special tokens."""
        return self._chat_template

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the model's default template."""
        return self._chat_template.source

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The token ids of `text`. `add_special`: with the tokens that begin and end a text, if the
        model uses them.

        In a result of `apply_chat_template`, `parse_special` applies to the template's text and not
        to the messages.

        Raises RequestError for text that is not Unicode. A byte that a byte-level vocabulary lacks
        is left out, as in other programs that use such a vocabulary; a log entry names it.
        """
        try:
            utf8 = text.encode()
        except UnicodeEncodeError as error:
            code = f"U+{ord(text[error.start]):04X}"
            raise RequestError(
                f"the text is not Unicode: it has the lone surrogate {code} at character "
                f"{error.start}"
            ) from None
        if self._known_bytes is not None and (unknown := utf8.translate(None, self._known_bytes)):
            names = ", ".join(f"0x{byte:02X}" for byte in sorted(set(unknown)))
            _log.warning(
                "bytes of a text are left out, because the model's vocabulary has no token for "
                "them: %s",
                names,
            )
        ids = _interruptible(len(text), lambda: self._cut(text, parse_special)) if text else []
        return [*self._prefix, *ids, *self._suffix] if add_special else ids

    def _cut(self, text: str, parse_special: bool) -> list[int]:
        with library_errors(RequestError, "the text cannot be cut into tokens"):
            if parse_special and isinstance(text, TracedText):
                return self._rendered.encode(text)
            rust = self._trusting if parse_special else self._plain
            # the batch call lets other threads run
            ids: list[int] = rust.encode_batch_fast([text], add_special_tokens=False)[0].ids
            return ids

    def check_length(self, text: str, max_tokens: int) -> None:
        """Raise PromptTooLongError for a `text` that cannot be `max_tokens` tokens or fewer.

        The text is not tokenized for this, so a prompt of a hundred megabytes costs no time.
        """
        most = max_tokens * self.max_token_chars
        if len(text) > most:
            raise PromptTooLongError(
                f"the text has {len(text)} characters; {max_tokens} tokens of this model hold at "
                f"most {most}"
            )

    @functools.cached_property
    def max_token_chars(self) -> int:
        """An upper limit of the characters that one token stands for. A factor allows for
        normalizers, which may shorten a text first. A run of characters outside the vocabulary
        counts as a long token.
        """
        return _MAX_SHRINKING * max(_UNKNOWN_CHARS, *map(len, self.vocabulary.tokens))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of a whole sequence. Bytes that are not UTF-8 become U+FFFD. Use `Detokenizer`
        for a text that grows.
        """
        skipped = self.special_token_ids if skip_special else frozenset()
        data = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        return (data.removeprefix(b" ") if self.strips_leading_space else data).decode(
            errors="replace"
        )

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; those of its name for a control token. Empty beyond the
        vocabulary, where models pad their embeddings.
        """
        return self.vocabulary.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """One token as text for display: part of a character shows as U+FFFD."""
        return self.token_bytes(token_id).decode(errors="replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
    ) -> TracedText:
        """The prompt for `messages`, to be encoded with `add_special=False, parse_special=True`. It
        records which characters the template wrote.

        The keywords and errors are those of `ChatTemplate.render`.
        """
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            continue_final_message=continue_final_message,
        )


def _interruptible(length: int, encode: Callable[[], list[int]]) -> list[int]:
    """Run `encode`. A long text is encoded in another thread while this one waits, so that signals
    are handled; within the library they would have to wait.
    """
    if length < _LONG_TEXT:
        return encode()
    found: SimpleQueue[list[int] | BaseException] = SimpleQueue()

    def work() -> None:
        try:
            found.put(encode())
        except BaseException as error:
            found.put(error)

    # a daemon, so that an interrupted program does not wait for it when it exits
    threading.Thread(target=work, name="pellucid-encode", daemon=True).start()
    answer = found.get()
    if isinstance(answer, BaseException):
        raise answer
    return answer


@contextlib.contextmanager
def library_errors(kind: type[PellucidError], what: str) -> Iterator[None]:
    """Turn whatever the `tokenizers` library raises into `kind`. Its exceptions have no types of
    their own, and its panics are not Exceptions.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, PellucidError) or not (
            isinstance(error, Exception) or type(error).__name__ == "PanicException"
        ):
            raise
        raise kind(f"{what}: {str(error)[:200]}") from None


def _without_special_tokens(rust: "tokenizers.Tokenizer") -> "tokenizers.Tokenizer":
    """A second tokenizer over the same model (shared, not copied) that reads special tokens in text
    as plain text.

    The library has a switch for this, but it changes the object. Two objects need no lock.
    """
    plain = tokenizer_like(rust)
    plain.add_tokens([token for _, token in sorted(rust.get_added_tokens_decoder().items())])
    plain.encode_special_tokens = True
    return plain


def _known_bytes(vocabulary: Vocabulary) -> bytes | None:
    """The bytes for which a byte-level vocabulary has a letter. None if it covers every byte of
    UTF-8.
    """
    if not vocabulary.byte_level:
        return None
    short = {text for text in vocabulary.tokens if len(text) == 1}
    known = bytes(byte for byte in range(256) if byte_letters(bytes([byte])) in short)
    never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # never in UTF-8
    return known if set(range(256)) - never - set(known) else None
