"""`AsyncEngine` on the tiny model: what its streams get when a request fails, a step crashes, the
engine is closed or the interpreter ends. Every loop runs in asyncio's debug mode.
"""

import asyncio
import itertools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pellucid import AsyncEngine, RequestOutput, SamplingParams
from pellucid.engine.core import EngineCore
from pellucid.errors import EngineDeadError, EngineError

from .async_harness import LONG, PATIENCE, SHORT, Gate, Served, last, run

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_a_poisoned_request_fails_alone(tiny_path: Path) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        nothing_left = SamplingParams(
            temperature=0, allowed_token_ids=[65], bad_words=["A"], max_tokens=4
        )
        bad, good = await asyncio.gather(
            last(served.engine, "x", nothing_left), last(served.engine, "x", SHORT)
        )
        assert (bad.outputs[0].finish_reason, good.outputs[0].finish_reason) == ("error", "length")
        await served.settled()
        await served.engine.close()

    run(main())


def _crashing(core: EngineCore, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the model's forward pass raise, the `at`-th time that it runs."""
    forward: Callable[[Any], Any] = core.runner.forward
    calls = itertools.count(1)

    def crash(batch: Any) -> Any:
        if next(calls) == at:
            raise ArithmeticError("the machine is on fire")
        return forward(batch)

    monkeypatch.setattr(core.runner, "forward", crash)


def test_a_crash_fails_what_the_core_held_and_the_engine_goes_on(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        expected = await last(served.engine, "x", SHORT)
        gate = Gate(served.core, monkeypatch)
        _crashing(served.core, monkeypatch, at=2)
        held = [asyncio.create_task(last(served.engine, "x", LONG))]
        await gate.stands_before(1)
        held += [asyncio.create_task(last(served.engine, "x", LONG)) for _ in range(2)]
        await served.holds(3)
        gate.let(1)
        await gate.stands_before(2)
        # in the inbox while the step crashes
        late = asyncio.create_task(last(served.engine, "x", SHORT))
        await served.holds(4)
        gate.let(1000)
        for error in await asyncio.gather(*held, return_exceptions=True):
            assert type(error) is EngineError and isinstance(error.__cause__, ArithmeticError)
            assert "the machine is on fire" in str(error)
        assert (await late).outputs == expected.outputs
        assert (await last(served.engine, "x", SHORT)).outputs == expected.outputs
        await served.settled()
        await served.engine.close()

    run(main())
    assert "a step of the engine crashed; 3 requests are lost" in caplog.text


def test_a_crash_that_leaves_the_books_wrong_ends_the_engine(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        served.core.scheduler.kv._pool.take()  # which nobody will free
        _crashing(served.core, monkeypatch, at=1)
        with pytest.raises(EngineDeadError) as dead:
            await last(served.engine, "x", LONG)
        assert isinstance(dead.value.__cause__, ArithmeticError)
        with pytest.raises(EngineDeadError, match=r"on fire.*counts other holders"):
            await anext(served.engine.generate("x", SHORT))
        await served.engine.close()

    run(main())


def test_closing_ends_the_streams_that_are_open(long_path: Path) -> None:
    endless = replace(LONG, max_tokens=90_000)

    async def main() -> None:
        engine = AsyncEngine.load(long_path)
        streams = [engine.generate("x", endless) for _ in range(3)]
        await anext(streams[0])
        tasks = [asyncio.create_task(anext(s)) for s in streams[1:]]
        await asyncio.sleep(0)
        await asyncio.gather(engine.close(), engine.close())
        with pytest.raises(EngineDeadError, match="closed"):
            async for _ in streams[0]:
                pass
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, EngineDeadError | RequestOutput)
        with pytest.raises(EngineDeadError, match="closed"):
            await anext(engine.generate("x", SHORT))
        engine.abort("0")
        await engine.close()
        for stream in streams:
            await stream.aclose()

    run(main())


def test_a_dropped_engine_ends_its_thread(tiny_path: Path) -> None:
    # that no thread is left is what every test of this file asserts
    run(last(AsyncEngine.load(tiny_path), "x", SHORT))


def test_an_interpreter_that_ends_with_work_in_flight_ends(tiny_path: Path) -> None:
    script = f"""
import asyncio
from pellucid import AsyncEngine, SamplingParams
engine = AsyncEngine.load({str(tiny_path)!r})
streams = [engine.generate("x", SamplingParams(max_tokens=90, ignore_eos=True)) for _ in range(4)]
async def main():
    for stream in streams:
        await anext(stream)
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert "Fatal" not in done.stderr and "Traceback" not in done.stderr
