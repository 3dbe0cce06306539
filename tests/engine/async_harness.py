"""What tests of `AsyncEngine` share: an engine whose core can be seen, a gate before its steps, and
event loops in debug mode.
"""

import asyncio
import threading
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pellucid import AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import build_engine

T = TypeVar("T")

LONG = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
SHORT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
PATIENCE = 300.0  # seconds until a test gives up


class Served:
    """An engine, and the core inside it for tests to look at."""

    def __init__(self, path: Path, **config: Any) -> None:
        # Tests count its steps, so each gives one token.
        engine = build_engine(path, EngineConfig(**{"speculative": None, **config}))
        self.core: EngineCore = engine.core
        self.engine = AsyncEngine(engine)

    async def holds(self, count: int) -> None:
        """Wait until so many requests were submitted and have not ended."""
        deadline = time.monotonic() + PATIENCE
        while len(self.engine._thread._boxes) < count:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)

    async def settled(self) -> None:
        """Wait until the core has nothing to do; then nothing may be held."""
        deadline = time.monotonic() + PATIENCE
        while self.core.has_unfinished or self.engine._thread._boxes:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.001)
        kv = self.core.scheduler.kv
        kv.check_integrity()
        assert kv.num_available_blocks == kv.num_blocks
        assert self.core._groups == {} and self.core._group_of == {}


class Gate:
    """Stands before `core.step`: a step waits until it is let through. `held` has what the core
    held at each.
    """

    def __init__(self, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
        self._core = core
        self._step = core.step
        self._changed = threading.Condition()
        self._allowed = 0
        self.held: list[set[str]] = []
        monkeypatch.setattr(core, "step", self._pass)

    def _pass(self) -> list[RequestOutput]:
        with self._changed:
            self.held.append(set(self._core._groups))
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._allowed >= len(self.held), PATIENCE)
        return self._step()

    def let(self, steps: int) -> None:
        with self._changed:
            self._allowed += steps
            self._changed.notify_all()

    async def stands_before(self, step: int) -> None:
        """Wait until step number `step`, from 1, is asked for."""

        def wait() -> bool:
            with self._changed:
                return self._changed.wait_for(lambda: len(self.held) >= step, PATIENCE)

        assert await asyncio.to_thread(wait)


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run in debug mode, which checks what is called from which thread. How slow a callback
    may be is not the test's to say.
    """

    async def patiently() -> T:
        asyncio.get_running_loop().slow_callback_duration = PATIENCE
        return await asyncio.wait_for(main, 4 * PATIENCE)

    return asyncio.run(patiently(), debug=True)


async def last(
    engine: AsyncEngine, prompt: Any, params: SamplingParams, request_id: str | None = None
) -> RequestOutput:
    outputs = [output async for output in engine.generate(prompt, params, request_id)]
    assert outputs[-1].finished
    return outputs[-1]
