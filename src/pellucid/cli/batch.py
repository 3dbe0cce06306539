"""`pellucid batch`: many prompts from a file, run as one batch. Each answer is written as soon as
it is complete.

Each line of the input is a request, each line of the output an answer (`batch_lines.py`,
`openai_batch.py`). Answers are written in the order in which they end. Lines are read while others
are answered, so a file may be larger than memory, and a program may write requests to standard
input over time. Answers that the output has already are kept and not computed again
(`answers_file.py`).

One thread reads lines, the event loop starts a task for each line and writes answers, and the
engine's core runs in its own thread.
"""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import click

from ..errors import EngineDeadError, PellucidError, QueueFullError, RequestError
from ..outputs import RequestOutput
from ..sampling_params import SamplingParams
from ..units import format_count
from .answer import Timing, render_chat
from .answers_file import AnswersFile
from .batch_lines import (
    Asked,
    Line,
    answer_record,
    error_record,
    make_params,
    parse_own,
    read_lines,
)
from .inputs import open_input, open_stdin
from .openai_batch import openai_answer, openai_error, parse_openai
from .options import (
    EngineOptions,
    ModelOptions,
    SamplingOptions,
    debug_option,
    engine_options,
    model_options,
    sampling_options,
    template_options,
)
from .signals import Stopped, cancel_instead
from .terminal import progress_bar, say

if TYPE_CHECKING:
    from ..engine.async_engine import AsyncEngine

__all__ = ["batch"]

MAX_TASKS = 1024  # requests in the engine at once, running or waiting
MAX_TASK_BYTES = 64 << 20  # total length of their lines
MAX_SHOWN_ERRORS = 10


@click.command()
@click.argument("requests", type=click.Path(exists=True, dir_okay=False, allow_dash=True))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Where answers go. Requests that are answered there are skipped.  [default: standard "
    "output]",
)
@click.option("--overwrite", is_flag=True, help="Begin anew: drop the answers in the output.")
@click.option("--stats", is_flag=True, help="Add to each answer how long it took, and why.")
@model_options()
@engine_options
@sampling_options(max_tokens=512)
@template_options
@debug_option
def batch(
    requests: str,
    output: Path | None,
    overwrite: bool,
    stats: bool,
    model: ModelOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    template: dict[str, Any],
) -> None:
    """Answer the REQUESTS of a file, together. "-" reads them from standard input.

    Each line is a JSON object with a "prompt", "prompt_token_ids" or "messages" (for a model with a
    chat template), and any of SamplingParams' fields ("temperature", "max_tokens", "seed", …);
    beside them "id", "priority", "tenant" and "cache_salt". Lines of OpenAI's Batch API
    ("custom_id", "url", "body") are answered in its form. The sampling options are the defaults for
    lines that do not say otherwise.

    A line that cannot be answered gets a record with an "error", and the exit status is then 1. An
    interrupted run is continued by the same command.
    """
    sampling.check()
    with (
        _Requests(requests) as file,
        AnswersFile(output, file.fileno(), overwrite=overwrite) as answers,
    ):
        waiting = _Unanswered(file, answers)
        first = next(waiting, None)
        if first is None:
            _report_nothing(requests, waiting)
            return
        # Load the model only if a request is left to answer.
        from ..engine.async_engine import AsyncEngine
        from ..engine.options import build_engine_config

        config = build_engine_config({**model.fields(), **engine.fields()})
        loaded = AsyncEngine.load(model.name, config, progress=True)
        defaults = sampling.choose(loaded.generation_config)
        say(f"[defaults: {defaults}]")
        is_hidden = answers.is_terminal or not sys.stderr.isatty()
        bar = progress_bar(unit="request", desc="batch", disable=is_hidden, leave=False)
        run = _Run(loaded, answers, defaults.values, template, stats, model.name, bar)
        try:
            asyncio.run(run.answer(first, waiting))
        except (KeyboardInterrupt, Stopped):
            if output is not None:
                say(f"[interrupted: {output} keeps its answers, and the same command goes on]")
            raise
    run.report(waiting.num_skipped)
    if run.num_errors:
        raise click.exceptions.Exit(1)


class _Requests:
    """The file of requests, or standard input."""

    def __init__(self, name: str) -> None:
        self.lent = False  # a thread reads from it, and may be blocked in a read
        self.file = open_stdin() if name == "-" else open_input(Path(name))

    def fileno(self) -> int | None:
        try:
            return self.file.fileno()
        except OSError:
            return None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.lent:  # close() would wait for the thread
            self.file.close()


class _Unanswered(Iterator[Line]):
    """The lines that have no answer yet."""

    def __init__(self, requests: _Requests, answers: AnswersFile) -> None:
        self.requests = requests
        self._lines = read_lines(requests.file)
        self._answers = answers
        self.num_skipped = 0

    def __next__(self) -> Line:
        for line in self._lines:
            if not self._answers.is_done(line.key, line.digest):
                return line
            self.num_skipped += 1
        raise StopIteration


@dataclass
class _Run:
    """One run of the command: answers all lines."""

    engine: "AsyncEngine"
    answers: AnswersFile
    defaults: Mapping[str, Any]
    template: Mapping[str, Any]
    stats: bool
    model: str
    bar: Any  # of tqdm: shows the progress on standard error
    num_requests: int = 0
    num_tokens: int = 0
    num_errors: int = 0
    seconds: float = 0.0

    async def answer(self, first: Line, rest: _Unanswered) -> None:
        """Answer all lines. The engine gets more requests than it runs at once, so that its policy
        can choose, but not all of them.
        """
        start, loop, task = time.monotonic(), asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with cancel_instead(lambda: loop.call_soon_threadsafe(task.cancel)), self.bar:
            await self._answer_all(first, rest)
        self.seconds = time.monotonic() - start

    async def _answer_all(self, first: Line, rest: _Unanswered) -> None:
        tasks: dict[asyncio.Task[None], int] = {}  # -> bytes of its line
        try:
            async for line in _in_background(first, rest):
                while tasks and (
                    len(tasks) >= MAX_TASKS or sum(tasks.values()) + line.num_bytes > MAX_TASK_BYTES
                ):
                    await _wait_for_one(tasks)
                tasks[asyncio.create_task(self._answer_line(line))] = line.num_bytes
            while tasks:
                await _wait_for_one(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.engine.close()

    async def _answer_line(self, line: Line) -> None:
        try:
            await self._write_answer(line)
        finally:
            self.num_requests += 1
            self.bar.update()

    async def _write_answer(self, line: Line) -> None:
        try:
            output = await self._generate(line)
        except EngineDeadError:
            raise
        except PellucidError as error:
            self._fail(line, str(error))
            make_error = openai_error if line.is_openai else error_record
            self.answers.write(make_error(line, str(error)))
            return
        timing = Timing.of(output, time.monotonic()) if self.stats else None
        self.num_tokens += sum(completion.num_tokens for completion in output.outputs)
        for completion in output.outputs:
            if completion.finish_reason == "error":
                self._fail(line, f"the answer broke off: {completion.stop_reason}")
        if line.is_openai:
            self.answers.write(openai_answer(line, output, timing, self.model))
        else:
            self.answers.write(answer_record(line, output, timing))

    async def _generate(self, line: Line) -> RequestOutput:
        if line.value is None:
            raise RequestError(line.error or "the line is no request")
        asked = parse_openai(line.value) if line.is_openai else parse_own(line.value)
        params = make_params(self.defaults, asked.sampling, line.number)
        prompt = self._tokenize(asked, params)
        while True:
            try:
                async for output in self.engine.generate(prompt, params):
                    last = output
                return last
            except QueueFullError:  # the queue is full (--max-waiting-requests): try again later
                await asyncio.sleep(0.05)

    def _tokenize(self, asked: Asked, params: SamplingParams) -> Mapping[str, Any]:
        if asked.messages is None:
            return asked.prompt
        template = {**self.template, **asked.chat}
        from ..engine.prompts import longest_prompt

        longest = longest_prompt(self.engine.max_model_len, params)
        rendered = render_chat(self.engine.tokenizer, asked.messages, template, longest)
        return {**asked.prompt, **rendered}

    def _fail(self, line: Line, message: str) -> None:
        self.num_errors += 1
        if self.num_errors <= MAX_SHOWN_ERRORS:
            self.bar.clear()
            say(f"[line {line.number}: {message}]")

    def report(self, num_skipped: int) -> None:
        """One line about the whole run."""
        parts = [
            f"{format_count(self.num_requests, 'request')} in {self.seconds:.1f} s",
            f"{self.num_tokens / max(self.seconds, 1e-9):.0f} tokens/s",
        ]
        if num_skipped:
            parts.append(f"{num_skipped} {'was' if num_skipped == 1 else 'were'} answered before")
        if self.num_errors:
            parts.append(f"{self.num_errors} failed")
        say(f"[{' · '.join(parts)}]")


async def _wait_for_one(tasks: dict["asyncio.Task[None]", int]) -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del tasks[task]
        task.result()  # an error that ends the run


async def _in_background(first: Line, rest: _Unanswered) -> AsyncIterator[Line]:
    """The lines, read by a thread, so that waiting for input never delays answers. The thread reads
    one line ahead.
    """
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[Line | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(1)

    def read() -> None:
        end: BaseException | None = None
        rest.requests.lent = True
        try:
            for line in rest:
                room.acquire()
                loop.call_soon_threadsafe(news.put_nowait, line)
        except RuntimeError:  # the loop is closed: the run has ended
            return
        except BaseException as error:
            end = error
        rest.requests.lent = False
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(news.put_nowait, end)

    threading.Thread(target=read, name="pellucid-batch-reader", daemon=True).start()
    yield first
    while (line := await news.get()) is not None:
        if isinstance(line, BaseException):
            raise line
        room.release()
        yield line


def _report_nothing(name: str, waiting: _Unanswered) -> None:
    if not waiting.num_skipped:
        raise RequestError(f"{name} holds no request; each line must be a JSON object")
    skipped = waiting.num_skipped
    which = "the one request is" if skipped == 1 else f"all {skipped} requests are"
    say(f"[{which} answered already; --overwrite begins anew]")
