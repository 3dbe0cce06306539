"""One `LLM`, many readers: open streams, nested calls, threads, interrupts and closing. Each reader
gets what it would get alone.
"""

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest

from pellucid import LLM, RequestOutput, SamplingParams
from pellucid.engine.prompts import Prompt, tokenize_prompt
from pellucid.errors import ConfigError, EngineDeadError, EngineError, PellucidError

PROMPTS = ["The capital", "A", "of France is a town that one cannot see from here", "th"]
PATIENCE = 600  # seconds until a test that waits for ever fails
ENDLESS = SamplingParams(temperature=0, max_tokens=90_000, ignore_eos=True)


def params(seed: int, max_tokens: int = 20) -> SamplingParams:
    return SamplingParams(temperature=1.3, seed=seed, max_tokens=max_tokens, ignore_eos=True)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.fixture(autouse=True)
def _patience() -> Iterator[None]:
    """Two readers that wait for each other fail instead of hanging."""

    def give_up(*_: object) -> NoReturn:
        raise TimeoutError(f"the test took more than {PATIENCE} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path)


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    """The tokens of each prompt, when nothing else runs."""
    return [
        llm.generate(prompt, params(i), use_tqdm=False)[0].outputs[0].token_ids
        for i, prompt in enumerate(PROMPTS)
    ]


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def assert_idle(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held_blocks) == (0, 0, 0)
    llm._thread.call(lambda core: core.scheduler.check_integrity())
    assert llm._thread._boxes == {}


# ---- streams and calls in one thread


def test_open_streams_advance_together_and_each_is_whole(llm: LLM, alone: list[list[int]]) -> None:
    streams = [llm.stream(prompt, params(i)) for i, prompt in enumerate(PROMPTS)]
    last: dict[int, RequestOutput] = {}
    waiting = dict(enumerate(streams))
    while waiting:
        for i, stream in list(waiting.items()):
            output = next(stream, None)
            if output is None:
                del waiting[i]
            else:
                last[i] = output
    assert [tokens(last[i]) for i in range(len(PROMPTS))] == alone
    assert all(output.finished for output in last.values())
    assert_idle(llm)


def test_every_call_works_while_a_stream_is_open(llm: LLM, alone: list[list[int]]) -> None:
    message = [{"role": "user", "content": "Hi"}]
    (chat,) = llm.chat(message, params(9), use_tqdm=False)
    seen = []
    for output in llm.stream(PROMPTS[0], params(0)):
        seen.append(tokens(output))
        if len(seen) == 2:
            assert [tokens(o) for o in llm.generate(PROMPTS[1:2], params(1))] == alone[1:2]
        elif len(seen) == 3:
            assert llm.chat(message, params(9))[0].outputs == chat.outputs
            abandoned = llm.stream(PROMPTS[2], params(2))
            next(abandoned)
        elif len(seen) == 4:
            assert tokens(list(llm.stream(PROMPTS[3], params(3)))[-1]) == alone[3]
    assert seen[-1] == alone[0]
    abandoned.close()
    assert_idle(llm)


def test_a_stream_that_nobody_reads_computes_nothing_and_holds_one_output(llm: LLM) -> None:
    slow = llm.stream(PROMPTS[0], params(0, 60))
    first = next(slow)
    steps = llm.stats().num_steps
    time.sleep(0.05)
    assert llm.stats().num_steps == steps
    llm.generate(PROMPTS[1], params(1, 40))
    (box,) = llm._thread._boxes.values()
    assert len(box._news) == 1
    # The newest is left: it has a token or more of each step that the other request needed.
    num_steps = llm.stats().num_steps - steps
    assert len(tokens(next(slow))) >= len(tokens(first)) + num_steps > len(tokens(first))
    slow.close()
    assert_idle(llm)


def test_as_completed_left_half_way_aborts_the_rest(llm: LLM) -> None:
    lengths = [params(i, n) for i, n in enumerate((2, 50, 60, 70))]
    answers = llm.as_completed(
        [tokenize_prompt(llm.tokenizer, p) for p in PROMPTS], lengths, use_tqdm=False
    )
    place, output = next(answers)
    assert (place, output.finished) == (0, True)
    answers.close()
    assert_idle(llm)


def test_nothing_is_queued_unless_all_can_be_served(llm: LLM) -> None:
    before = llm.stats()
    with pytest.raises(PellucidError):
        prompts: list[Prompt] = ["ok", [65] * 200]
        llm.generate(prompts, params(0))
    assert_idle(llm)
    after = llm.stats()
    assert (after.num_steps, after.num_prompt_tokens) == (
        before.num_steps,
        before.num_prompt_tokens,
    )


def test_what_was_submitted_is_a_copy(llm: LLM, alone: list[list[int]]) -> None:
    mine, ids = params(0), llm.tokenizer.encode(PROMPTS[0])
    stream = llm.stream(ids, mine)
    first = next(stream)
    ids[:] = [9999]
    first.prompt_token_ids[:] = first.outputs[0].token_ids[:] = [9999]
    mine.temperature, mine.max_tokens, mine.n = -1.0, 0, -1
    assert tokens(list(stream)[-1]) == alone[0]
    with pytest.raises(ConfigError):
        llm.generate(PROMPTS[0], mine)
    assert_idle(llm)


def test_poisoned_prompts_queue_nothing(llm: LLM) -> None:
    """An iterable that raises, an entry that is no prompt, and ids that are no integers."""

    def breaks() -> Iterator[str]:
        yield "fine"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        llm.generate(breaks(), params(0))
    for poisoned in (["hi", 5, "there"], [[1.5, 2.7]], b"bytes", [["a"]]):
        with pytest.raises(PellucidError):
            llm.generate(poisoned, params(0))  # type: ignore[arg-type]
    assert_idle(llm)


def test_a_generator_of_prompts_is_read(llm: LLM, alone: list[list[int]]) -> None:
    outputs = llm.generate((p for p in PROMPTS), [params(i) for i in range(len(PROMPTS))])
    assert [tokens(o) for o in outputs] == alone


def test_keywords_of_generate_and_chat_reach_the_prompt(llm: LLM) -> None:
    special = "<|im_end|>"
    parsed, letters = (
        llm.generate(special, params(0, 1), parse_special=on)[0].prompt_token_ids
        for on in (True, False)
    )
    assert (len(parsed), len(letters)) == (1, len(special))
    (short,) = llm.generate("abcdef", params(0, 1), truncate_prompt_tokens=2)
    assert short.prompt_token_ids == [ord("e"), ord("f")]
    (last,) = llm.stream("abcdef", params(0, 1), truncate_prompt_tokens=1)
    assert last.prompt_token_ids == [ord("f")]
    message = [{"role": "user", "content": "Hi"}]
    template = "{{ greeting }}{% for m in messages %}{{ m.content }}{% endfor %}"
    keywords = {"chat_template": template, "chat_template_kwargs": {"greeting": "> "}}
    (answer,) = llm.chat(message, params(0, 1), **keywords)  # type: ignore[arg-type]
    assert answer.prompt == "> Hi"
    (answer,) = llm.chat_stream(message, params(0, 1), **keywords)  # type: ignore[arg-type]
    assert answer.prompt == "> Hi"
    begun = [*message, {"role": "assistant", "content": "Well"}]
    (answer,) = llm.chat(
        begun, params(0, 1), add_generation_prompt=False, continue_final_message=True
    )
    assert answer.prompt is not None and answer.prompt.endswith("Well")


def test_priorities_of_a_call_order_its_prompts(tiny_path: Path) -> None:
    with LLM(tiny_path, max_num_seqs=1, scheduling_policy="priority") as llm:
        outputs = llm.generate(PROMPTS, params(0, 4), priority=[3, 1, 2, 0])
        times = [output.metrics.finished_time for output in outputs]
        assert sorted(range(4), key=lambda i: times[i] or 0.0) == [3, 1, 2, 0]


# ---- threads


def test_threads_share_one_llm_exactly(llm: LLM, alone: list[list[int]]) -> None:
    wrong: list[object] = []
    messages = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    chats = [
        llm.chat(m, params(i), use_tqdm=False)[0].outputs[0].token_ids
        for i, m in enumerate(messages)
    ]

    def work(seed: int) -> None:
        for turn in range(8):
            i = (seed + turn) % len(PROMPTS)
            match turn % 4:
                case 3:
                    (answer,) = llm.chat(messages[i], params(i), use_tqdm=False)
                    found = alone[i] if tokens(answer) == chats[i] else tokens(answer)
                case 0:
                    found = tokens(llm.generate(PROMPTS[i], params(i), use_tqdm=False)[0])
                case 1:
                    found = tokens(list(llm.stream(PROMPTS[i], params(i)))[-1])
                case _:
                    many = llm.generate(
                        PROMPTS, [params(k) for k in range(len(PROMPTS))], use_tqdm=False
                    )
                    found = tokens(many[i])
            if found != alone[i]:
                wrong.append((seed, turn, found))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert_idle(llm)


# ---- exceptions and signals


def in_a_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    return thread, answers


@contextmanager
def interrupted(seconds: float) -> Iterator[None]:
    """Send the main thread a real SIGINT after so much CPU time of the process, and expect it.

    A timer's signal would reach the thread that runs, the engine's. The main thread, asleep until
    its answers are whole, would see it only then.
    """
    end = time.process_time() + seconds

    def send() -> None:
        while time.process_time() < end:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    with pytest.raises(KeyboardInterrupt):
        sender.start()
        yield
        sender.join()
    sender.join()


def test_an_interrupt_ends_one_reader_and_no_other(long_path: Path) -> None:
    short = greedy(100)
    # one thread: where 20 others want the CPU, barriers between threads take minutes
    with LLM(long_path, max_model_len=4096, kv_cache_memory=64 << 20, threads=1) as llm:
        expected = tokens(llm.generate(PROMPTS[0], short)[0])
        half = llm.stream(PROMPTS[0], short)
        seen = [tokens(next(half)) for _ in range(3)]
        for turn in range(8):
            thread, answers = in_a_thread(lambda: tokens(llm.generate(PROMPTS[0], short)[0]))
            with interrupted(0.02 + 0.013 * turn):
                if turn % 2:
                    llm.generate(PROMPTS, [greedy(4000)] * len(PROMPTS), use_tqdm=False)
                else:
                    for _ in llm.stream(PROMPTS[1], greedy(4000)):
                        pass
            thread.join()
            assert answers == [expected]
        assert seen[-1] == expected[: len(seen[-1])] and len(seen[-1]) >= 3
        assert tokens(list(half)[-1]) == expected
        assert_idle(llm)
        assert tokens(llm.generate(PROMPTS[0], short)[0]) == expected


def test_an_exception_in_a_loop_over_a_stream_loses_nothing(
    llm: LLM, alone: list[list[int]]
) -> None:
    other = llm.stream(PROMPTS[0], params(0))
    next(other)
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream(PROMPTS[1], params(1)):
            _ = 1 / 0
    assert tokens(list(other)[-1]) == alone[0]
    assert_idle(llm)


def test_a_crashed_step_fails_those_it_computed_and_the_llm_goes_on(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny_path)
    expected = tokens(llm.generate(PROMPTS[0], params(0))[0])
    with monkeypatch.context() as patch:

        def crash(step: object) -> NoReturn:
            raise ArithmeticError("the machine is on fire")

        patch.setattr(llm._thread._core.runner, "execute", crash)
        with pytest.raises(EngineError, match="on fire") as lost:
            llm.generate(PROMPTS, params(0))
        assert isinstance(lost.value.__cause__, ArithmeticError)
    assert tokens(llm.generate(PROMPTS[0], params(0))[0]) == expected
    assert_idle(llm)


# ---- closing


def test_after_close_every_call_says_so_and_the_memory_is_free(tiny_path: Path) -> None:
    before = set(threading.enumerate())
    with LLM(tiny_path) as llm:
        llm.generate("x", params(0))
        stream = llm.stream("x", params(0))
        next(stream)
        core = weakref.ref(llm._thread._core)
    gc.collect()
    assert core() is None
    assert set(threading.enumerate()) <= before
    for call in (
        lambda: next(stream),
        lambda: llm.generate("x", params(0)),
        lambda: llm.generate([], params(0)),
        lambda: llm.chat([{"role": "user", "content": "x"}]),
        lambda: next(llm.stream("x")),
        llm.stats,
        llm.summary,
        llm.reset_prefix_cache,
    ):
        with pytest.raises(EngineDeadError, match="closed"):
            call()
    llm.close()


def test_close_wakes_whoever_waits(long_path: Path) -> None:
    llm = LLM(long_path, max_model_len=90_100, kv_cache_memory=256 << 20)

    def work() -> str:
        with pytest.raises(EngineDeadError, match="closed"):
            llm.generate("x", ENDLESS, use_tqdm=False)
        return "told"

    thread, answers = in_a_thread(work)
    while not llm.stats().num_running:
        time.sleep(0.001)
    llm.close()
    thread.join()
    assert answers == ["told"]


def test_a_dropped_llm_ends_its_thread_and_frees_its_core(tiny_path: Path) -> None:
    before = set(threading.enumerate())
    llm = LLM(tiny_path)
    llm.generate("x", params(0))
    core = weakref.ref(llm._thread._core)
    del llm
    gc.collect()
    assert core() is None and set(threading.enumerate()) <= before


def test_the_prefix_cache_is_reset(tiny_path: Path) -> None:
    llm = LLM(tiny_path)
    prompt = "a prompt of more than one block of sixteen tokens"
    first, again = (llm.generate(prompt, params(0))[0] for _ in range(2))
    assert (first.num_cached_tokens, again.num_cached_tokens > 0) == (0, True)
    assert llm.reset_prefix_cache() is True
    (after,) = llm.generate(prompt, params(0))
    assert after.num_cached_tokens == 0 and after.outputs == first.outputs


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_is_told_to_load_its_own_model_and_does_not_wait_for_ever(llm: LLM) -> None:
    llm.generate("ab", params(0))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            llm.generate("ab", params(0))
        except EngineError as error:
            code = 0 if "load the model in this process" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
