"""Builds an engine from a file: checkpoint, tokenizer, weights in the backend's layout, KV cache,
scheduler and core.

All checks, those of memory too, are made before the weights are loaded. Sizes are in bytes.
"""

import logging
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from ..backends.registry import get_backend
from ..config import ModelConfig
from ..engine_config import EngineConfig
from ..errors import CapacityError, ConfigError, UnsupportedError, named_errors
from ..formats import packed_bytes
from ..formats.tensor import TensorSpec
from ..kv.draft_coverage import DraftCoverage
from ..kv.layout import KVLayout, build_layout
from ..kv.manager import KVCacheManager
from ..kv.storage import KVStorage
from ..kv_spec import KVSpec, build_kv_specs
from ..models.registry import get_graph
from ..ops.backend import Backend
from ..ops.kv_dtypes import choose_kv_dtypes
from ..ops.protocol import KVLayer, Tensor
from ..sampling_params import SamplingParams
from ..scheduler import Scheduler
from ..speculative import Speculation, build_proposers
from ..speculative.draft_model import DraftModelProposer
from ..speculative.methods import DRAFT, check_method
from ..speculative.proposer import Proposer
from ..tokenizer import Tokenizer, load_tokenizer
from ..units import format_bytes
from ..weights.checkpoint import Checkpoint, open_checkpoint
from ..weights.fields import config_from_file
from ..weights.generation_config import read_generation_config
from ..weights.hub import resolve_model
from ..weights.pooling_config import read_pooling
from .background import Background
from .core import EngineCore
from .draft import DraftModel, build_draft_runner, check_size, check_vocabulary, draft_name
from .explanation import Explain, build_explain
from .memory import check_fits, count_logits, count_scored, engine_bytes, plan_kv_cache
from .model_runner import ModelRunner

__all__ = ["Engine", "OpenModel", "build_core", "build_engine", "load_engine", "open_model"]

_log = logging.getLogger(__name__)

_T = TypeVar("_T")

GROUP_BYTES = 128 << 20  # of weights that are read in one call: a tenth of a second, from memory


@dataclass(frozen=True, slots=True)
class Engine:
    """A loaded model, ready to run."""

    path: Path
    model_config: ModelConfig
    tokenizer: Tokenizer
    core: EngineCore
    # what the model's authors recommend, by names of SamplingParams; empty: nothing
    generation_config: Mapping[str, float | int]
    pooling: str | None  # how they pool embeddings; None: the file does not say


def load_engine(
    model: str | Path,
    config: EngineConfig,
    *,
    cache_dir: Path | None = None,
    progress: bool = False,
) -> Engine:
    """Find the model and its draft model, or fetch them into `cache_dir` with a progress bar on
    standard error, and load them.
    """
    check_method(config.speculative)
    path = resolve_model(str(model), cache_dir=cache_dir, progress=progress)
    if (name := draft_name(config)) is not None:
        with named_errors("the draft model"):
            draft = resolve_model(name, cache_dir=cache_dir, progress=progress)
        config = replace(config, speculative=f"{DRAFT}{draft}")
    return build_engine(path, config)


def build_engine(path: Path, config: EngineConfig) -> Engine:
    """Load the model at `path`. Raises a PellucidError that says what is wrong, if possible before
    memory is taken.
    """
    with open_model(path) as model:
        return model.build_engine(config)


@contextmanager
def open_model(path: Path) -> Iterator["OpenModel"]:
    """Open the model at `path`, to build any number of engines from it. Engines stay usable after
    it is closed.
    """
    with open_checkpoint(path) as checkpoint, ExitStack() as drafts:
        yield OpenModel(path, checkpoint, drafts)


class _WeightsKey(NamedTuple):
    """Engines share weights where these agree: a backend's other options do not change them."""

    backend: str
    device: str
    rank: int  # in the tensor-parallel group; 0 where there is one rank
    quantization: str | None  # at load


class OpenModel:
    """A checkpoint and its tokenizer, which is built when first used. The first engine loads the
    weights, and all engines share them.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, drafts: ExitStack | None = None) -> None:
        """`drafts` closes the draft models that are opened; None: no engine will have one."""
        self.path = path
        self._open_drafts = drafts
        self.model_config = checkpoint.config
        self._checkpoint = checkpoint
        self._recommended = read_generation_config(checkpoint.tokenizer_source)
        with config_from_file(str(path)):
            SamplingParams(**self._recommended)  # type: ignore[arg-type]
        self._pooling = read_pooling(checkpoint.tokenizer_source)
        self._weights: dict[_WeightsKey, dict[str, Tensor]] = {}
        self._drafts: dict[str, OpenModel] = {}  # by the names that engines gave

    def _chosen(self, quantization: str | None) -> Checkpoint:
        """The model as its files have it, or quantized while it is loaded."""
        if quantization is None:
            return self._checkpoint
        from ..quant.at_load import quantize_at_load  # most engines do not need it

        return quantize_at_load(self._checkpoint, quantization)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises a PellucidError where the file has none that fits the model."""
        tokenizer = load_tokenizer(self._checkpoint.tokenizer_source)
        # special tokens without a row in the embedding are refused when a request uses them
        if tokenizer.text_vocab_size > self.model_config.vocab_size:
            raise ConfigError(
                f"{self.path}: the tokenizer cuts text into {tokenizer.text_vocab_size} tokens, "
                f"and the model has only {self.model_config.vocab_size}"
            )
        return tokenizer

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Format and shape of every parameter, as the files have it."""
        return self._checkpoint.specs()

    def is_loaded(self, backend: Backend, quantization: str | None) -> bool:
        """True if `load_weights` takes no more memory."""
        return _WeightsKey(backend.name, backend.device, 0, quantization) in self._weights

    def load_weights(self, backend: Backend, quantization: str | None) -> dict[str, Tensor]:
        """The weights in the backend's layout. The first call loads them, in another thread while
        the tokenizer is built here.
        """
        key = _WeightsKey(backend.name, backend.device, 0, quantization)
        if key not in self._weights:
            checkpoint = self._chosen(quantization)
            with Background(lambda: _load_weights(checkpoint, backend)) as loading:
                _ = self.tokenizer
                self._weights[key] = dict(ChainMap(*loading.result()))
        return self._weights[key]

    def _draft(self, config: EngineConfig) -> "OpenModel | None":
        """The draft model of an engine, which may be this model itself; None: it has none."""
        name = draft_name(config)
        if name is None:
            return None
        if name not in self._drafts:
            draft = self
            with named_errors("the draft model"):
                path = resolve_model(name)
                if not path.samefile(self.path):
                    assert self._open_drafts is not None
                    checkpoint = self._open_drafts.enter_context(open_checkpoint(path))
                    draft = OpenModel(path, checkpoint)
            if draft is not self:
                check_size(name, draft.specs, self.specs)
                check_vocabulary(name, draft.tokenizer, self.tokenizer)
            self._drafts[name] = draft
        return self._drafts[name]

    def layout(self, config: EngineConfig) -> KVLayout:
        """The shape of the KV cache of an engine."""
        return self._layout(_backend(config), config)

    def _layout(self, backend: Backend, config: EngineConfig) -> KVLayout:
        if config.block_size % backend.block_multiple:
            raise ConfigError(
                f"block_size is {config.block_size}; the {backend.name} backend needs a multiple "
                f"of {backend.block_multiple}"
            )
        dtypes = choose_kv_dtypes(config.kv_cache_dtype, backend.kv_dtypes)
        specs = build_kv_specs(self.model_config, *dtypes)
        draft = self._draft(config)
        if draft is not None:
            specs += build_kv_specs(draft.model_config, *dtypes)
        token_bytes = [backend.kv_token_bytes(s) for s in specs]
        return build_layout(specs, token_bytes, config.block_size, keep_all=draft is not None)

    def _step_bytes(
        self,
        backend: Backend,
        config: EngineConfig,
        specs: Mapping[str, TensorSpec],
        kv_specs: Sequence[KVSpec],
        num_logits: int,
    ) -> dict[str, int]:
        """The memory that the largest step takes, from the parameters' declarations alone."""
        graph, model = get_graph(self.model_config.graph), self.model_config
        layers = [KVLayer(spec) for spec in kv_specs]
        return backend.step_bytes(
            lambda ops, batch: graph.forward_with_hidden(ops, model, specs, batch, layers),
            config.max_num_batched_tokens,
            num_logits,
            config.max_model_len or model.max_position_embeddings,
        )

    def build_engine(self, config: EngineConfig, *, num_logits: int | None = None) -> Engine:
        """A new engine with its own KV cache. `num_logits`: the most rows of logits of a step, for
        a caller that runs the forward pass itself; None: as many as the scheduler allows. Raises
        ConfigError or CapacityError before weights are loaded.
        """
        check_method(config.speculative)
        # Does the backend have kernels for the model, and is there memory?
        backend = _backend(config)
        backend.check_model(self.model_config)
        specs = self._chosen(config.quantization).specs()
        draft = self._draft(config)
        if draft is not None:
            try:
                backend.check_model(draft.model_config)
            except UnsupportedError as error:
                raise UnsupportedError(f"the draft model: {error}") from None
        layout = self._layout(backend, config)
        max_num_seqs = _or(config.max_num_seqs, backend.default_max_num_seqs)
        if num_logits is None:
            num_logits = count_logits(self.model_config, config, max_num_seqs)
        max_model_len, num_blocks = self._plan_memory(
            backend, config, specs, layout, max_num_seqs, num_logits, draft
        )
        if config.preemption == "swap" and config.swap_bytes < layout.bytes_per_block:
            raise CapacityError(
                f"swap_space is {format_bytes(config.swap_bytes)}; one block takes "
                f"{format_bytes(layout.bytes_per_block)}"
            )
        # Load the weights for the first engine; then build the parts of this engine.
        try:
            weights = self.load_weights(backend, config.quantization)
            drafting = None
            if draft is not None:
                drafting = DraftModel(draft.model_config, draft.load_weights(backend, None))
            core = build_core(
                self.model_config,
                self.tokenizer,
                config,
                backend,
                weights,
                layout,
                max_num_seqs,
                max_model_len,
                num_blocks,
                build_explain(self.model_config, specs, backend, layout, config),
                draft=drafting,
            )
        except CapacityError:  # a MemoryError with a better sentence
            raise
        except MemoryError as error:
            raise CapacityError(
                f"{self.path}: memory ran out while the model was loaded, though "
                f"{format_bytes(backend.available_memory())} are said to be available"
            ) from error
        recommended = self._recommended, self._pooling
        return Engine(self.path, self.model_config, self.tokenizer, core, *recommended)

    def _plan_memory(
        self,
        backend: Backend,
        config: EngineConfig,
        specs: Mapping[str, TensorSpec],
        layout: KVLayout,
        max_num_seqs: int,
        num_logits: int,
        draft: "OpenModel | None",
    ) -> tuple[int, int]:
        """(max_model_len, num_blocks); raises CapacityError if the engine does not fit. Weights
        that are loaded already count 0.
        """
        available = backend.available_memory()
        weight_bytes = 0
        draft_items: dict[str, int] = {}
        is_shared = draft is self and config.quantization is None
        if draft is not None and not is_shared and not draft.is_loaded(backend, None):
            draft_items["weights"] = sum(map(backend.weight_bytes, draft.specs.values()))
        if not self.is_loaded(backend, config.quantization):
            weight_bytes = sum(map(backend.weight_bytes, specs.values()))
            # a parameter is read as the file packs it, and then laid out by the backend
            stored = self.specs.values()
            reading = {"the largest parameter as it is read": max(map(packed_bytes, stored))}
            check_fits(config, {"weights": weight_bytes, **reading}, available)
        num_layers = self.model_config.num_layers
        items = engine_bytes(
            self.model_config,
            config,
            max_num_seqs,
            weight_bytes,
            self._step_bytes(backend, config, specs, layout.specs[:num_layers], num_logits),
        )
        if draft is not None:
            rows = min(max_num_seqs, config.max_num_batched_tokens)
            kv_specs = layout.specs[num_layers:]
            draft_items |= draft._step_bytes(backend, config, draft.specs, kv_specs, rows)
            items |= {f"{name} of the draft model": size for name, size in draft_items.items()}
        check_fits(config, items, available)
        return plan_kv_cache(
            self.model_config, config, layout, max_num_seqs, available - sum(items.values())
        )


def build_core(
    model_config: ModelConfig,
    tokenizer: Tokenizer,
    config: EngineConfig,
    backend: Backend,
    weights: dict[str, Tensor],
    layout: KVLayout,
    max_num_seqs: int,
    max_model_len: int,
    num_blocks: int,
    explain: Explain | None,
    *,
    draft: DraftModel | None = None,
) -> EngineCore:
    """The engine's core and all its parts, for weights that are loaded."""
    num_slots = (
        0 if config.preemption == "recompute" else config.swap_bytes // layout.bytes_per_block
    )
    storage = KVStorage(backend, layout, num_blocks, num_slots)
    if config.preemption == "swap":
        storage.open_tier()  # a requested swap_space is opened now, so that it fails now
    forward = get_graph(model_config.graph).forward_with_hidden
    layers = storage.layers[: model_config.num_layers]
    runner = ModelRunner(
        backend.build_forward(
            lambda ops, batch: forward(ops, model_config, weights, batch, layers)
        ),
        storage,
        block_size=config.block_size,
    )
    coverage = None if draft is None else DraftCoverage(num_blocks, config.block_size)
    kv = KVCacheManager(
        layout,
        num_blocks,
        enable_prefix_caching=_or(config.enable_prefix_caching, backend.default_prefix_caching),
        num_slots=num_slots,
        saving_pays=runner.saving_pays if config.preemption == "auto" else storage.saving_works,
        coverage=coverage,
    )
    scheduler = Scheduler(
        kv,
        max_model_len=max_model_len,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        policy=config.scheduling_policy,
        batching=config.batching,
        max_num_scored=count_scored(model_config.vocab_size),
        max_waiting_requests=config.max_waiting_requests,
        max_waiting_tokens=config.max_waiting_tokens,
    )
    draft_runner = None
    proposers = _build_proposers(config, backend)
    if draft is not None and coverage is not None:
        draft_runner = build_draft_runner(
            draft, backend, kv, storage, coverage, model_config, config.max_num_batched_tokens
        )
        proposers.append(DraftModelProposer(draft_runner))
    speculation = None
    if proposers:
        speculation = Speculation(
            proposers, model_config.vocab_size, num_speculative_tokens=config.num_speculative_tokens
        )
    return EngineCore(
        model_config,
        tokenizer,
        scheduler,
        runner,
        seed=config.seed,
        speculation=speculation,
        draft_runner=draft_runner,
        explain=explain,
    )


def _build_proposers(config: EngineConfig, backend: Backend) -> list[Proposer]:
    """Those that need no model; beside a draft model those of `auto`. `auto`, the default, has none
    on a backend whose sums depend on the number of rows, because drafts could change an answer
    there.
    """
    method = config.speculative or "none"
    if method.startswith(DRAFT):
        return build_proposers("auto")
    if method == "auto" and not backend.is_batch_invariant:
        _log.info("speculative is auto, which drafts nothing on the backend %s", backend.name)
        return []
    return build_proposers(method)


def _load_weights(checkpoint: Checkpoint, backend: Backend) -> Iterator[dict[str, Tensor]]:
    """The weights, in groups."""
    matrices = checkpoint.stored_matrices()
    loaded: set[str] = set()
    for names in _groups({n: packed_bytes(m.spec) for n, m in matrices.items()}):
        group = backend.load_stored({name: matrices[name] for name in names})
        loaded |= group.keys()
        yield group
    for name, tensor in checkpoint.parameters(without=loaded):
        yield {name: backend.load_weight(tensor, name)}


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """The names, in order, in groups of about GROUP_BYTES."""
    group: list[str] = []
    for name in sizes:
        group.append(name)
        if sum(sizes[n] for n in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group


def _backend(config: EngineConfig) -> Backend:
    return get_backend(config.backend, config.backend_options)


def _or(value: _T | None, default: _T) -> _T:
    return default if value is None else value
