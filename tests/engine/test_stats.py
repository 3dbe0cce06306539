"""What an engine tells of itself: requests, blocks, tokens and the times of its steps."""

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from pellucid import LLM, AsyncEngine, EngineConfig, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import build_engine, open_model
from pellucid.engine.model_runner import ModelRunner
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.engine.stats import STEP_SECONDS, StepTimes

PARAMS = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)


class Clock:
    """Every reading is a second later."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def test_the_clock_is_an_argument_and_times_add_up(tiny_path: Path) -> None:
    engine = build_engine(tiny_path, EngineConfig())
    clock = Clock()
    runner: ModelRunner = engine.core.runner
    runner._clock = clock
    core = EngineCore(
        engine.model_config, engine.tokenizer, engine.core.scheduler, runner, seed=0, clock=clock
    )
    core.add_requests([Submission("a", TokenizedPrompt([65, 66, 67], None), PARAMS)])
    while core.has_unfinished:
        (output,) = core.step()
    stats = core.stats()
    assert stats.num_steps == 5
    # the readings of a step: begin, planned, before and after the model, executed, booked
    assert stats.last_step == StepTimes(schedule=1.0, execute=3.0, forward=1.0, update=1.0)
    assert stats.all_steps == StepTimes(schedule=5.0, execute=15.0, forward=5.0, update=5.0)
    assert stats.all_steps.total == 25.0
    assert sum(stats.step_histogram) == 5
    assert stats.step_histogram[STEP_SECONDS.index(5.0)] == 5
    assert output.metrics.arrival_time == 1.0


def test_counts_of_requests_tokens_and_blocks(tiny_path: Path) -> None:
    llm = LLM(tiny_path, enable_prefix_caching=True)
    first = llm.stats()
    assert first.num_free_blocks == first.num_kv_blocks and first.num_steps == 0
    stream = llm.stream("a" * 40, PARAMS)
    next(stream)
    running = llm.stats()
    assert (running.num_running, running.num_waiting, running.num_held_blocks) == (1, 0, 3)
    list(stream)
    (again,) = llm.generate("a" * 40, PARAMS)
    stats = llm.stats()
    assert stats.num_free_blocks + stats.num_cached_blocks == stats.num_kv_blocks
    assert (stats.num_running, stats.num_held_blocks) == (0, 0) and stats.num_cached_blocks > 0
    assert stats.num_prompt_tokens == 80
    assert stats.num_cached_tokens == again.num_cached_tokens > 0
    assert stats.num_output_tokens == 10
    assert stats.num_computed_tokens == 80 - stats.num_cached_tokens + 2 * 4
    assert stats.all_steps.total > stats.all_steps.forward > 0
    with pytest.raises(FrozenInstanceError):
        stats.num_running = 3  # type: ignore[misc]


def test_swapping_is_counted_and_its_file_is_told_once(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with open_model(tiny_path) as model:
        block = model.layout(EngineConfig()).bytes_per_block
    llm = LLM(
        tiny_path,
        max_model_len=64,
        kv_cache_memory=6 * block,
        preemption="swap",
        swap_space=64 * block / (1 << 30),
    )
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    llm.generate(["a" * 40, "b" * 40, "c" * 40], params)
    stats = llm.stats()
    assert stats.num_preemptions > 0 and stats.num_loaded_blocks > 0
    assert 0 < stats.num_saved_blocks <= 64 and stats.swap_file_bytes == 64 * block
    assert sum("may be saved in a file" in r.getMessage() for r in caplog.records) == 1


def test_an_async_engine_tells_without_waiting(tiny_path: Path) -> None:
    async def main() -> Iterator[int]:
        async with AsyncEngine.load(tiny_path) as engine:
            assert engine.stats().num_steps == 0
            async for _ in engine.generate("x", PARAMS):
                pass
            while engine.stats().num_running:
                await asyncio.sleep(0.001)
            return iter([engine.stats().num_steps, engine.stats().num_output_tokens])

    assert list(asyncio.run(main())) == [5, 5]
