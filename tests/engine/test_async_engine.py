"""`AsyncEngine` on the tiny model: what it streams, what leaving costs, what it refuses. Every loop
runs in asyncio's debug mode.
"""

import asyncio
import itertools
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import pellucid.engine.async_engine as async_engine
import pellucid.engine.core_thread as core_thread
from pellucid import LLM, AsyncEngine, EngineConfig, RequestOutput, SamplingParams
from pellucid.batch import ForwardBatch
from pellucid.errors import ConfigError, QueueFullError, RequestError
from pellucid.ops.backend import Logits

from .async_harness import LONG, PATIENCE, SHORT, Gate, Served, last, run

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


def test_32_streams_at_once_give_what_each_gives_alone(tiny_path: Path) -> None:
    prompts = [f"{i} of the {'capital ' * (i % 5)}towns" for i in range(32)]
    params = [
        SamplingParams(
            temperature=(i % 3) * 0.7,
            seed=i,
            max_tokens=3 + i % 17,
            ignore_eos=i % 2 == 0,
            logprobs=1,
            n=1 + i % 2,
        )
        for i in range(32)
    ]
    llm = LLM(tiny_path)
    alone = [
        llm.generate(p, q, use_tqdm=False)[0].outputs for p, q in zip(prompts, params, strict=True)
    ]

    async def main() -> list[RequestOutput]:
        async with AsyncEngine.load(tiny_path) as engine:
            return await asyncio.gather(
                *(last(engine, p, q) for p, q in zip(prompts, params, strict=True))
            )

    together = run(main())
    assert [o.outputs for o in together] == alone
    assert [o.prompt for o in together] == prompts
    assert len({o.request_id for o in together}) == 32


def test_prompts_of_one_submission_answer_as_alone_or_none_runs(
    tiny_path: Path, tiny: LLM, backend: str
) -> None:
    prompts: list[Any] = ["The capital", [5, 6, 7], "of the towns"]
    alone = [o.outputs for o in tiny.generate(prompts, LONG, use_tqdm=False)]

    async def main() -> None:
        served = Served(tiny_path, backend=backend)
        async with served.engine as engine:
            found = {}
            async for index, output in engine.generate_all(prompts, LONG):
                found[index] = output
            assert [found[i].outputs for i in range(3)] == alone
            before = engine.stats()
            refused: list[tuple[Any, str]] = [
                ([10**6], "token id"),
                ("a" * 9999, "prompt"),
                (5, r"prompts\[1"),
            ]
            for bad, sentence in refused:
                with pytest.raises(RequestError, match=sentence):
                    await anext(engine.generate_all(["fine", bad], LONG))
            await served.settled()
            assert engine.stats().num_steps == before.num_steps

    run(main())


def test_a_stream_grows_to_what_generate_returns(tiny_path: Path, tiny: LLM, backend: str) -> None:
    async def main() -> list[RequestOutput]:
        served = Served(tiny_path, backend=backend)
        async with served.engine as engine:
            outputs = [output async for output in engine.generate("The capital", LONG)]
            await served.settled()
        return outputs

    outputs = run(main())
    (whole,) = tiny.generate("The capital", LONG, use_tqdm=False)
    assert outputs[-1].outputs == whole.outputs
    assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]
    for before, after in itertools.pairwise(o.outputs[0] for o in outputs):
        assert after.text.startswith(before.text) and len(after.token_ids) > len(before.token_ids)


def test_a_conversation_is_rendered_as_llm_renders_it(
    tiny_path: Path, tiny: LLM, backend: str
) -> None:
    messages = [{"role": "user", "content": "Hi"}]

    async def main() -> list[RequestOutput]:
        async with AsyncEngine.load(tiny_path, EngineConfig(backend=backend)) as engine:
            return [o async for o in engine.chat(messages, SHORT)]

    (expected,) = tiny.chat(messages, SHORT, use_tqdm=False)
    answer = run(main())[-1]
    assert (answer.prompt, answer.prompt_token_ids, answer.outputs) == (
        expected.prompt,
        expected.prompt_token_ids,
        expected.outputs,
    )


def test_one_engine_serves_several_event_loops_at_once(tiny_path: Path) -> None:
    engine = AsyncEngine.load(tiny_path)
    texts: list[str] = []

    def serve() -> None:
        texts.append(run(last(engine, "The capital", LONG)).outputs[0].text)

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    run(engine.close())
    assert len(texts) == 4 and len(set(texts)) == 1


def test_no_thread_runs_before_the_first_request(tiny_path: Path) -> None:
    def num_threads() -> int:
        return sum(thread.name == "pellucid-engine" for thread in threading.enumerate())

    async def main() -> None:
        before = num_threads()
        engine = AsyncEngine.load(tiny_path)
        stream = engine.generate("x", SHORT)
        assert num_threads() == before
        await anext(stream)
        assert num_threads() == before + 1
        await stream.aclose()
        await engine.close()

    run(main())


@pytest.mark.parametrize("phase", ["submitted", "waiting", "prefill", "decode"])
@pytest.mark.parametrize("way", ["cancel", "abort"])
def test_who_leaves_holds_nothing_at_the_next_step(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, phase: str, way: str
) -> None:
    """The victim's prompt takes 10 steps. The bystander, who was there first, gets what it would
    have got.
    """

    async def main() -> None:
        served = Served(tiny_path, max_num_batched_tokens=4)
        expected = await last(served.engine, "by", SHORT)
        gate = Gate(served.core, monkeypatch)
        bystander = None
        if phase in ("submitted", "waiting"):
            bystander = asyncio.create_task(last(served.engine, "by", SHORT, "bystander"))
            await gate.stands_before(1)
        victim = asyncio.create_task(last(served.engine, [65] * 40, LONG, "victim"))
        await served.holds(2 if bystander else 1)
        steps = {"submitted": 0, "waiting": 1, "prefill": 3, "decode": 12}[phase]
        gate.let(steps)
        await gate.stands_before(steps + 1)
        assert ("victim" in gate.held[-1]) == (phase != "submitted")
        if way == "abort":
            served.engine.abort("nobody")
            served.engine.abort("victim")
        else:
            victim.cancel()
            with pytest.raises(asyncio.CancelledError):
                await victim
        gate.let(1000)
        if way == "abort":
            output = await victim
            assert output.outputs[0].finish_reason == "abort" and output.metrics.finished_time
            # the step at the gate still ran
            assert len(output.outputs[0].token_ids) == (4 if phase == "decode" else 0)
        if bystander:
            assert (await bystander).outputs == expected.outputs
        await served.settled()
        assert all("victim" not in held for held in gate.held[steps + 1 :])
        await served.engine.close()

    run(main())


def test_breaking_out_of_the_loop_aborts(tiny_path: Path) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        async with served.engine as engine:
            async for output in engine.generate("The capital", LONG):
                if len(output.outputs[0].token_ids) >= 3:
                    break
            await served.settled()

    run(main())


def test_a_request_whose_loop_is_gone_is_dropped(tiny_path: Path) -> None:
    """A loop that was closed without a word: nobody is left to leave the stream."""
    served = Served(tiny_path)
    loop = asyncio.new_event_loop()
    stream = served.engine.generate("The capital", SamplingParams(max_tokens=90, ignore_eos=True))
    loop.run_until_complete(anext(stream))
    loop.close()
    run(served.settled())
    run(served.engine.close())
    del stream


def test_a_slow_consumer_misses_outputs_and_holds_up_nobody(tiny_path: Path) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        expected = await last(served.engine, "slow", LONG)
        slow = served.engine.generate("slow", LONG)
        first = await anext(slow)  # on a fast machine it is the last one
        await last(served.engine, "fast", LONG)
        await served.settled()  # the slow request has ended too
        seen = [first] + [output async for output in slow]
        assert len(seen) <= 2 and seen[-1].outputs == expected.outputs
        await served.engine.close()

    run(main())


def test_a_blocked_loop_is_told_once(tiny_path: Path) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        stream = served.engine.generate("x", LONG)
        await anext(stream)
        while served.core._counts.num_steps < 40:  # the loop runs nothing meanwhile
            time.sleep(0.001)
        ready = len(asyncio.get_running_loop()._ready)  # type: ignore[attr-defined]
        assert ready <= 1
        assert len([output async for output in stream]) < 30
        await served.engine.close()

    run(main())


def test_what_cannot_be_served_is_refused_in_the_callers_task(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        served = Served(tiny_path)
        engine = served.engine
        gate = Gate(served.core, monkeypatch)
        other = asyncio.create_task(last(engine, "other", LONG, "taken"))
        await gate.stands_before(1)
        with pytest.raises(RequestError, match="request_id 'taken' is in use"):
            await anext(engine.generate("x", SHORT, "taken"))
        gate.let(1000)
        refused: list[tuple[Any, SamplingParams, type[Exception], str]] = [
            ([65] * 200, SHORT, RequestError, r"200 tokens.*at most 95"),
            ([9999], SHORT, RequestError, "token id 9999 is outside"),
            ("", SHORT, RequestError, "empty"),
            (
                "x",
                SamplingParams(logit_bias={5000: 1.0}),
                ConfigError,
                "logit_bias holds token id 5000",
            ),
        ]
        for prompt, params, error, message in refused:
            with pytest.raises(error, match=message):
                await anext(engine.generate(prompt, params))
        with pytest.raises(RequestError, match="'prompt' or 'prompt_token_ids'"):
            await anext(engine.generate({"text": "x"}))
        assert (await other).outputs[0].finish_reason == "length"
        await served.settled()
        await engine.close()

    run(main())


def test_the_inbox_is_bounded(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_thread, "_MAX_SUBMITTED", 3)

    async def main() -> None:
        served = Served(tiny_path)
        gate = Gate(served.core, monkeypatch)
        first = asyncio.create_task(last(served.engine, "x", SHORT))
        await gate.stands_before(1)
        more = [asyncio.create_task(last(served.engine, "x", SHORT)) for _ in range(3)]
        await served.holds(4)
        with pytest.raises(QueueFullError, match="3 requests wait"):
            await anext(served.engine.generate("x", SHORT))
        gate.let(1000)
        outputs = await asyncio.gather(first, *more)
        assert len({o.outputs[0].text for o in outputs}) == 1
        await served.settled()
        await served.engine.close()

    run(main())


@pytest.mark.parametrize("way", ["tokenize_prompt", "tokenize_chat"])
def test_a_long_text_and_a_slow_template_do_not_hold_up_the_loop(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """The text is read only after the loop has gone on."""
    gone_on = threading.Event()
    read = getattr(async_engine, way)

    def read_later(*args: Any, **kwargs: Any) -> Any:
        assert gone_on.wait(60)
        return read(*args, **kwargs)

    async def main() -> None:
        async with AsyncEngine.load(tiny_path) as engine:
            asyncio.get_running_loop().call_later(0.01, gone_on.set)
            if way == "tokenize_chat":
                messages = [{"role": "user", "content": "ab"}]
                template = "{{ messages[0].content }}"
                async for _ in engine.chat(messages, SHORT, chat_template=template):
                    pass
            else:
                await last(engine, "ab", SHORT)

    monkeypatch.setattr(async_engine, way, read_later)
    run(main())


def test_readers_are_notified_while_the_next_step_is_in_the_model(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that never ends holds back no output of the step before."""

    async def main() -> None:
        served = Served(tiny_path)
        runner, steps, go_on = served.core.runner, 0, threading.Event()
        forward = runner.forward

        def stop_in_the_second(batch: ForwardBatch) -> Logits:
            nonlocal steps
            steps += 1
            if steps == 2:
                assert go_on.wait(PATIENCE)
            return forward(batch)

        monkeypatch.setattr(runner, "forward", stop_in_the_second)
        outputs = served.engine.generate("abc", SHORT)
        first = await anext(outputs)
        assert len(first.outputs[0].token_ids) == 1 and steps <= 2
        go_on.set()
        rest = [output async for output in outputs]
        assert rest[-1].finished
        await served.settled()
        await served.engine.close()

    run(main())
