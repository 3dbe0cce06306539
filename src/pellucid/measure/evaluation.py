"""The inputs of one run of `pellucid perplexity`: a model, a text, and possibly a base. They are
opened and checked against each other before the first step.

The base is a second model that runs together with the first, chunk by chunk, or a file that an
earlier run saved. For a comparison token by token, both models must cut the text into the same
tokens and have vocabularies of the same size.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..engine.loader import OpenModel, open_model
from ..engine_config import EngineConfig
from ..errors import ConfigError, RequestError
from ..tokenizer import Tokenizer
from ..tokenizer.vocabulary import TokenKind
from .divergence import Base, Divergence, LiveBase, measure_divergence
from .logits_file import LogitsDtype, SavedBase, SavingBase, file_bytes
from .perplexity import Perplexity, Protocol, cut_windows, measure_perplexity
from .scoring import Scorer, Windows

__all__ = ["Evaluation", "check_same_tokens", "open_evaluation"]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A run that is ready to start."""

    windows: Windows
    scorer: Scorer
    base: Base | None
    base_name: str | None
    new_file_bytes: int | None  # the size of the logits file that will be written, if any

    def run(self) -> Iterator[Perplexity | Divergence]:
        """Yields the result so far whenever chunks are complete; the last is the result."""
        if self.base is None:
            return measure_perplexity(self.scorer, self.windows)
        return measure_divergence(self.scorer, self.windows, self.base)


@contextmanager
def open_evaluation(
    path: Path,
    config: EngineConfig,
    text: str,
    protocol: Protocol,
    *,
    n_ctx: int | None = None,
    chunks: int | None = None,
    base_path: Path | None = None,
    logits_file: Path | None = None,
    logits_dtype: LogitsDtype = "float16",
) -> Iterator[Evaluation]:
    """Open the model at `path`, and the base, if any. The base is the model at `base_path`, whose
    predictions are saved to `logits_file` if that is given; or, without `base_path`, the contents
    of that file.

    `chunks`: score only so many first chunks; None: all. `n_ctx` None: that of the file, else the
    protocol's. Raises a PellucidError with one sentence if the inputs do not match. A new file gets
    its name when the context ends, if the run is complete.
    """
    with ExitStack() as stack:
        saved = None
        if base_path is None and logits_file is not None:
            if not logits_file.exists():
                raise ConfigError(f"{logits_file} is not there; with --kl-base MODEL it is written")
            saved = stack.enter_context(SavedBase(logits_file))
        elif logits_file is not None and logits_file.exists():
            raise ConfigError(
                f"{logits_file} is there already; leave out --kl-base to compare with it, or give "
                "another name"
            )
        n_ctx = n_ctx or (saved.n_ctx if saved else protocol.default_n_ctx)
        # cut the text
        model = stack.enter_context(open_model(path))
        vocab_size = model.model_config.vocab_size
        if saved is None:
            windows = cut_windows(model.tokenizer, text, protocol, n_ctx, chunks)
        else:
            windows = cut_windows(model.tokenizer, text, protocol, n_ctx, saved.num_windows)
            saved.check(windows, vocab_size)
            if chunks is not None and chunks > len(windows):
                raise RequestError(
                    f"{logits_file} holds {len(windows)} chunks; {chunks} are asked for"
                )
            windows = windows.begin(chunks)
        # load the base first, so that its errors come early; then the model
        base: Base | None = saved
        base_name = saved.name if saved else None
        new_file_bytes = None
        if base_path is not None:
            base_name = base_path.name
            base_model = stack.enter_context(open_model(base_path))
            base_windows = cut_windows(base_model.tokenizer, text, protocol, n_ctx, chunks)
            check_same_tokens(model, windows, base_model, base_windows)
            base = LiveBase(Scorer(base_model, config, n_ctx), windows)
        scorer = Scorer(model, config, n_ctx)
        if logits_file is not None and base_path is not None and base is not None:
            new_file_bytes = file_bytes(windows, vocab_size, logits_dtype)
            base = stack.enter_context(
                SavingBase(
                    logits_file,
                    base,
                    windows,
                    vocab_size=vocab_size,
                    name=base_path.name,
                    dtype=logits_dtype,
                )
            )
        yield Evaluation(windows, scorer, base, base_name, new_file_bytes)


def check_same_tokens(
    model: OpenModel, windows: Windows, base: OpenModel, base_windows: Windows
) -> None:
    """Raise RequestError, with the first difference, unless both models have one vocabulary and
    see the same tokens. Rows that fill a vocabulary up, and special tokens, may differ.
    """
    name, base_name = model.path.name, base.path.name
    size, base_size = model.model_config.vocab_size, base.model_config.vocab_size
    if size != base_size:
        raise RequestError(
            f"{name} has a vocabulary of {size} tokens and the base {base_name} one of "
            f"{base_size}: only models of one vocabulary can be compared"
        )
    # the tokens that text is made of
    ours, theirs = model.tokenizer, base.tokenizer
    common = (TokenKind.NORMAL, TokenKind.BYTE)
    shared = set(ours.vocabulary.ids_of(*common)).intersection(theirs.vocabulary.ids_of(*common))
    for token_id in sorted(shared):
        if ours.token_bytes(token_id) != theirs.token_bytes(token_id):
            raise RequestError(
                f"{name} and the base {base_name} differ in token {token_id}: "
                f"{_shown(ours, token_id)} and {_shown(theirs, token_id)}; only models of one "
                "vocabulary can be compared"
            )
    # the tokens that this text is cut into
    found, expected = windows.token_ids.ravel(), base_windows.token_ids.ravel()
    length = min(len(found), len(expected))
    differs = found[:length] != expected[:length]
    if differs.any():
        place = int(differs.argmax())
        token_id, base_id = int(found[place]), int(expected[place])
        raise RequestError(
            f"{name} and the base {base_name} cut the text into different tokens: token {place} "
            f"is {token_id} ({_shown(ours, token_id)}) and {base_id} "
            f"({_shown(theirs, base_id)}); only models of one vocabulary can be compared"
        )
    if len(found) != len(expected):
        raise RequestError(
            f"{name} and the base {base_name} cut the text into different tokens: {len(windows)} "
            f"and {len(base_windows)} chunks; only models of one vocabulary can be compared"
        )


def _shown(tokenizer: Tokenizer, token_id: int) -> str:
    """A token as a short text for a message."""
    tokens = tokenizer.vocabulary.tokens
    return repr(tokens[token_id][:40]) if token_id < len(tokens) else "padding"
