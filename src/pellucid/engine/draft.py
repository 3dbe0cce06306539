"""The draft model of an engine: what may be one, and what it needs.

A draft model is another checkpoint, named by `speculative="draft:MODEL"`. Its layers keep their
keys and values in the blocks of the model's own cache: a block has those of both.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import ModelConfig
from ..engine_config import EngineConfig
from ..errors import ConfigError
from ..formats.tensor import TensorSpec
from ..kv.draft_coverage import DraftCoverage
from ..kv.manager import KVCacheManager
from ..kv.storage import KVStorage
from ..models.registry import get_graph
from ..ops.backend import Backend
from ..ops.protocol import Tensor
from ..speculative.methods import DRAFT
from ..tokenizer import Tokenizer
from .draft_runner import DraftRunner

__all__ = ["DraftModel", "build_draft_runner", "check_size", "check_vocabulary", "draft_name"]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A draft model that is loaded."""

    config: ModelConfig
    weights: dict[str, Tensor]


def build_draft_runner(
    draft: DraftModel,
    backend: Backend,
    kv: KVCacheManager,
    storage: KVStorage,
    coverage: DraftCoverage,
    model: ModelConfig,
    max_tokens: int,
) -> DraftRunner:
    """A runner of the draft model, whose layers lie behind those of `model` in the cache."""
    forward = get_graph(draft.config.graph).forward_with_hidden
    layers = storage.layers[model.num_layers :]
    return DraftRunner(
        backend.build_forward(
            lambda ops, batch: forward(ops, draft.config, draft.weights, batch, layers)
        ),
        kv,
        storage,
        coverage,
        vocab_sizes=(model.vocab_size, draft.config.vocab_size),
        context=draft.config.max_position_embeddings,
        max_tokens=max_tokens,
    )


def draft_name(config: EngineConfig) -> str | None:
    """The model that drafts, as the user named it; None: no model does."""
    if config.speculative is None or not config.speculative.startswith(DRAFT):
        return None
    return config.speculative.removeprefix(DRAFT).strip()


def check_size(name: str, draft: Mapping[str, TensorSpec], model: Mapping[str, TensorSpec]) -> None:
    """Raise ConfigError if the draft model has more parameters than the model."""
    sizes = [sum(math.prod(spec.shape) for spec in specs.values()) for specs in (draft, model)]
    if sizes[0] > sizes[1]:
        raise ConfigError(
            f"the draft model {name} has {sizes[0]:,} parameters and the model {sizes[1]:,}; a "
            "draft must not be larger"
        )


def check_vocabulary(name: str, draft: Tokenizer, model: Tokenizer) -> None:
    """Raise ConfigError, with the first difference, unless both models mean the same by each token
    id. Ids that stand for no text are not compared.
    """
    ours, theirs = model.vocabulary, draft.vocabulary
    if ours.byte_level == theirs.byte_level and ours.tokens == theirs.tokens:
        return
    for i in range(max(len(ours.tokens), len(theirs.tokens))):
        a, b = ours.token_bytes(i), theirs.token_bytes(i)
        if a != b:
            raise ConfigError(
                f"the draft model {name} has another vocabulary: token {i} is {_show(b)} there and "
                f"{_show(a)} in the model"
            )


def _show(token: bytes) -> str:
    return repr(token.decode(errors="replace")[:80]) if token else "no text"
