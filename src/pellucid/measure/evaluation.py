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

import numpy as np

from ..engine.loader import OpenModel, open_model
from ..engine_config import EngineConfig
from ..errors import ConfigError, RequestError
from .divergence import Base, Divergence, LiveBase, measure_divergence
from .logits_file import LogitsDtype, SavedBase, SavingBase, file_bytes
from .perplexity import Perplexity, Protocol, cut_windows, measure_perplexity
from .scoring import Scorer, Windows

__all__ = ["Evaluation", "open_evaluation"]


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
            _check_same(model, windows, base_model, base_windows)
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


def _check_same(model: OpenModel, windows: Windows, base: OpenModel, other: Windows) -> None:
    """Raise RequestError unless both models see the same tokens."""
    size, base_size = model.model_config.vocab_size, base.model_config.vocab_size
    if size != base_size:
        raise RequestError(
            f"{model.path.name} has a vocabulary of {size} tokens and the base {base.path.name} "
            f"one of {base_size}: only models of one vocabulary can be compared"
        )
    if not np.array_equal(windows.token_ids, other.token_ids):
        raise RequestError(
            f"{model.path.name} and the base {base.path.name} cut the text into different tokens: "
            "only models of one vocabulary can be compared"
        )
