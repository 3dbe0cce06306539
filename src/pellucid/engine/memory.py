"""The memory plan: how much an engine will take, computed before anything is loaded.

    available >= weights + a step's activations, logits and scratch + sampling + KV cache

A step is planned at its largest: `max_num_batched_tokens` tokens, and a row of logits for each
sequence and for each prompt token that one step may score. Weights that are in memory already count
0. The KV cache gets a part of the rest. Sizes are in bytes.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from ..config import ModelConfig
from ..engine_config import EngineConfig
from ..errors import CapacityError, ConfigError
from ..host_memory import lies_in_memory
from ..kv.layout import KVLayout
from ..units import format_bytes

__all__ = ["check_fits", "count_logits", "count_scored", "engine_bytes", "plan_kv_cache"]

_log = logging.getLogger(__name__)

# The sampler works on so many rows at a time, and keeps so many bytes per token of the vocabulary
# for each: corrected logits, and the tokens that are left with their noise.
SAMPLED_TOGETHER = 16
SAMPLING_BYTES = 4 + 8 + 8
# Logits of a step that score prompts (prompt_logprobs): so many bytes, or so many rows
SCORED_BYTES = 64 << 20
MIN_SCORED = 64
KV_SHARE = 4  # the KV cache takes at most one part in so many of what is free, unless told


def count_scored(vocab_size: int) -> int:
    """The most prompt tokens that a step scores. Each takes a row of logits."""
    return max(MIN_SCORED, SCORED_BYTES // (4 * vocab_size))


def count_logits(model: ModelConfig, config: EngineConfig, max_num_seqs: int) -> int:
    """The most rows of logits of a step: one for each sequence, and those that score prompts."""
    return min(config.max_num_batched_tokens, max_num_seqs + count_scored(model.vocab_size))


def engine_bytes(
    model: ModelConfig,
    config: EngineConfig,
    max_num_seqs: int,
    weight_bytes: int,
    step_bytes: Mapping[str, int],
) -> dict[str, int]:
    """Bytes that an engine takes beside its KV cache, by purpose."""
    rows = min(max_num_seqs, SAMPLED_TOGETHER)
    items = {
        "weights": weight_bytes,
        **step_bytes,
        "sampling": rows * model.vocab_size * SAMPLING_BYTES,
    }
    if config.preemption == "swap":
        from tempfile import gettempdir  # most engines save nothing, and start faster without it

        if lies_in_memory(Path(gettempdir())):
            items["swap_space, whose folder lies in memory,"] = config.swap_bytes
    return items


def check_fits(config: EngineConfig, items: Mapping[str, int], available: int) -> None:
    """Raise CapacityError, naming the largest items, if they do not fit."""
    needed = sum(items.values())
    if needed <= available:
        return
    largest = sorted(items.items(), key=lambda item: -item[1])[:3]
    raise CapacityError(
        f"the model needs {format_bytes(needed)} of memory beside its KV cache, and "
        f"{format_bytes(available)} are available; the largest parts: "
        + ", ".join(f"{name} {format_bytes(size)}" for name, size in largest)
        + (
            f" (activations and logits grow with max_num_batched_tokens, which is "
            f"{config.max_num_batched_tokens})"
            if largest[0][0] in ("activations", "logits")
            else ""
        )
    )


def plan_kv_cache(
    model: ModelConfig, config: EngineConfig, layout: KVLayout, max_num_seqs: int, free: int
) -> tuple[int, int]:
    """How long a request may be and how many blocks there are: (max_model_len, num_blocks). `free`
    is what the rest of the engine leaves.

    A context length that the user asked for is granted or refused (CapacityError). Otherwise it is
    the model's own, or as much of it as fits, which one log message says.
    """
    wanted = config.max_model_len or model.max_position_embeddings
    if wanted > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {wanted}; the model was made for at most "
            f"{model.max_position_embeddings} tokens"
        )
    if wanted < 2:
        raise ConfigError(
            f"the model was made for at most {wanted} token; a request needs a prompt of one token "
            "and an output of one"
        )
    # blocks that the longest request needs
    chunk, block_bytes = config.max_num_batched_tokens, layout.bytes_per_block
    blocks = layout.blocks_for(wanted, chunk)
    arithmetic = (
        f"{wanted} tokens in {blocks} blocks of {layout.block_size} tokens · "
        f"{format_bytes(block_bytes)} (keys and values of {len(layout.stores)} layers) = "
        f"{format_bytes(blocks * block_bytes)}"
    )
    # blocks that there will be, beside the one that block tables are padded with
    match config.kv_cache_memory:
        case None:  # what all requests that may run at once could need, within the KV cache's share
            num_blocks = min(blocks * max_num_seqs, (free - block_bytes) // KV_SHARE // block_bytes)
        case float() as share:
            num_blocks = int((free - block_bytes) * share) // block_bytes
        case memory:
            num_blocks = memory // block_bytes
            if memory + block_bytes > free:
                raise CapacityError(
                    f"kv_cache_memory is {format_bytes(memory)}; beside the weights and what a "
                    f"step needs at most {format_bytes(max(0, free - block_bytes))} are available"
                )
    # the longest request that they hold
    memory = num_blocks * block_bytes
    fits = layout.tokens_in(num_blocks, chunk, wanted)
    if fits < wanted and config.max_model_len is not None:
        raise CapacityError(
            f"a KV cache of {format_bytes(memory)} holds a request of {fits} tokens; max_model_len "
            f"needs {arithmetic}"
        )
    if fits < 2:
        raise CapacityError(
            f"a KV cache of {format_bytes(max(0, memory))} holds no request; one block takes "
            f"{format_bytes(block_bytes)}"
        )
    if fits < wanted:
        _log.warning(
            "max_model_len is lowered from %d to %d: the KV cache would need %s and has %s",
            wanted,
            fits,
            arithmetic,
            format_bytes(memory),
        )
    return fits, num_blocks
