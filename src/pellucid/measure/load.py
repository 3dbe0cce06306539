"""A load test: requests sent at given times, at most so many at once, and what came of each.

Open loop: requests are sent at their arrival times, whatever the server does. Closed loop: so many
clients each send their next request when the last is answered. Both together: arrivals wait for a
free client, and that wait is reported.

The generator watches itself. Late sends are the time between the moment at which a request could
have been sent and the moment at which it was. Loop lag is how late the event loop wakes from a
short sleep: that is how late the arrival of a token may be stamped. Where these are not small
beside the figures, or the client needs a whole CPU, the report says that the figures are doubtful.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .load_client import Server, encode_request
from .load_statistics import RequestRecord
from .load_workload import LoadRequest, Workload

__all__ = ["LoadRun", "LoadSettings", "client_report", "run_load"]

LAG_SECONDS = 0.01  # the sleep that loop lag is measured with
TIMER_MS = 1.0  # timers of an event loop have whole milliseconds: less is no lag
MEDIAN_SHARE = 0.1  # a median lag above this share of the median ITL or TTFT spoils the figures
TAIL_SHARE = 0.5  # the same for the 99th percentiles: the waits of a busy machine are in both
CPU_SHARE = 0.8  # of one CPU: Python uses no more
PROGRESS_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class LoadSettings:
    """How requests are sent."""

    num_requests: int | None  # None: until `duration` has passed
    duration: float | None = None  # seconds in which requests are sent; the last are waited for
    max_concurrency: int | None = None
    ignore_eos: bool = False
    extra_body: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class LoadRun:
    """A run, complete or interrupted. Times in seconds."""

    records: list[RequestRecord] = field(default_factory=list)
    seconds: float = 0.0  # from the first request to the end of the last
    num_unfinished: int = 0  # they were with the server when the run was interrupted
    late_sends: list[float] = field(default_factory=list)
    loop_lags: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # for a free client
    cpu_seconds: float = 0.0  # of this process


async def run_load(
    server: Server,
    model: str,
    workload: Workload,
    arrivals: Iterator[float],
    settings: LoadSettings,
    run: LoadRun,
    progress: Callable[[int, int, int], None] | None = None,
) -> None:
    """Send all requests and fill `run`; if this is cancelled, `run` holds what was measured.

    `progress` is called a few times per second with the numbers of requests that are sent, answered
    and failed.
    """
    sending = _Sending(server, model, workload, settings, run)
    watchers = [asyncio.create_task(_watch_lag(run.loop_lags))]
    if progress is not None:
        watchers.append(asyncio.create_task(_show(sending, progress)))
    cpu = time.process_time()
    try:
        await sending.send_all(arrivals)
    finally:
        run.cpu_seconds = time.process_time() - cpu
        for task in (*watchers, *sending.tasks):
            task.cancel()
        await asyncio.gather(*watchers, *sending.tasks, return_exceptions=True)
        run.num_unfinished = sending.num_sent - len(run.records)
        ends = [record.end for record in run.records]
        run.seconds = max(ends, default=0.0) - min((r.sent for r in run.records), default=0.0)
        run.records.sort(key=lambda record: record.index)


class _Sending:
    """The requests of one run."""

    def __init__(
        self, server: Server, model: str, workload: Workload, settings: LoadSettings, run: LoadRun
    ) -> None:
        self._server, self._model, self._workload = server, model, workload
        self._settings, self.run = settings, run
        self._free = asyncio.Semaphore(settings.max_concurrency or 1 << 30)
        self.tasks: set[asyncio.Task[None]] = set()
        self.num_sent = 0
        self._bugs: list[BaseException] = []

    async def send_all(self, arrivals: Iterator[float]) -> None:
        """Start each request at its time and wait until all are answered."""
        settings, request = self._settings, self._workload.request
        start = time.perf_counter()
        for i, due in enumerate(arrivals):
            # Enough?
            if i in (settings.num_requests, self._workload.count):
                break
            if settings.duration is not None and due >= settings.duration:
                break
            # Its body is made before its time has come, so that this costs no punctuality.
            asked = request(i)
            body = encode_request(
                asked, self._model, ignore_eos=settings.ignore_eos, extra=settings.extra_body
            )
            await asyncio.sleep(start + due - time.perf_counter())
            arrived = time.perf_counter()
            await self._free.acquire()
            now = time.perf_counter()
            if settings.duration is not None and now - start >= settings.duration:
                break
            self.run.waits.append(now - arrived)
            self._start(i, due, asked, body, start, max(start + due, now))
        while self.tasks:
            await asyncio.wait(self.tasks)
        if self._bugs:
            raise self._bugs[0]

    def _start(
        self, i: int, due: float, asked: LoadRequest, body: bytes, start: float, ready: float
    ) -> None:
        record = RequestRecord(
            i, due, ready - start, asked_input=asked.input_length, asked_output=asked.output_length
        )

        async def send() -> None:
            try:
                await self._server.send(asked.path, body, record, start)
                self.run.late_sends.append(record.sent - (ready - start))
                self.run.records.append(record)
            finally:
                self._free.release()

        self.num_sent += 1
        task = asyncio.create_task(send())
        self.tasks.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            self._bugs.append(bug)  # failures of requests are in their records


async def _watch_lag(lags: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_SECONDS)
        lags.append(max(time.perf_counter() - before - LAG_SECONDS, 0.0))


async def _show(sending: _Sending, progress: Callable[[int, int, int], None]) -> None:
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        failed = sum(record.error is not None for record in sending.run.records)
        progress(sending.num_sent, len(sending.run.records), failed)


def client_report(run: LoadRun, summary: Mapping[str, Any]) -> dict[str, Any]:
    """How far the generator can be trusted; times in ms. `doubt`: a clause, or None."""
    late, lags = _spread(run.late_sends), _spread(run.loop_lags)
    connecting = [r.connected - r.sent for r in run.records if r.connected is not None]
    share = run.cpu_seconds / run.seconds if run.seconds else 0.0
    doubt = None
    for name in ("itl", "ttft"):
        median, tail = summary.get(f"median_{name}_ms"), summary.get(f"p99_{name}_ms")
        if median and lags[0] > max(MEDIAN_SHARE * median, TIMER_MS):
            doubt = (
                f"the client was {lags[0]:.1f} ms late, beside {median:.1f} ms of {name.upper()}"
            )
        elif tail and lags[1] > TAIL_SHARE * tail:
            doubt = (
                f"the client was up to {lags[1]:.1f} ms late (99 %), beside {tail:.1f} ms of "
                f"{name.upper()}"
            )
        if doubt is not None:
            break
    if share > CPU_SHARE:
        doubt = f"the client needed {share:.0%} of a CPU, and can use no more than one"
    return {
        "late_sends_p99_ms": late[1],
        "late_sends_max_ms": late[2],
        "loop_lag_median_ms": lags[0],
        "loop_lag_p99_ms": lags[1],
        "loop_lag_max_ms": lags[2],
        "connecting_median_ms": _spread(connecting)[0],
        "cpu_share": share,
        "max_concurrency_wait_p99_ms": _spread(run.waits)[1],
        "doubt": doubt,
    }


def _spread(seconds: list[float]) -> tuple[float, float, float]:
    """(median, 99th percentile, most) in ms."""
    if not seconds:
        return 0.0, 0.0, 0.0
    median, tail = np.percentile(seconds, (50, 99))
    return float(median) * 1e3, float(tail) * 1e3, max(seconds) * 1e3
