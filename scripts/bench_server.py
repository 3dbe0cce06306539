"""What the server costs per token beside the engine: CPU time of its event loop (HTTP, JSON) and of
the engine's own Python, at several numbers of clients.

    scripts/bench server MODEL [--clients 1,8,32] [--tokens 128] [--rounds 3] [OPTION OF serve …]

It starts `pellucid serve MODEL` and streams chats from that many clients at once, at temperature 0,
where choosing a token costs least. The CPU time of the server's main thread, in which the event
loop runs, is read from /proc (Linux). That of the engine's Python is the CPU time of its thread in
steps, but for the model and for copying KV blocks, from /metrics. The last line is JSON.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

TICKS = os.sysconf("SC_CLK_TCK")


def start(model: str, options: list[str]) -> tuple[subprocess.Popen[str], str]:
    """The server and its URL."""
    command = [sys.executable, "-m", "pellucid", "serve", model, "--port", "0", "--no-access-log"]
    command += options
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    for line in server.stderr:
        if found := re.search(r"API +(http\S+)/v1", line):
            return server, found[1]
    sys.exit("scripts/bench server: the server did not start")


def loop_seconds(pid: int) -> float:
    """CPU time of the main thread so far."""
    fields = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as answer:
        text = await answer.text()
    found = re.search(rf"^pellucid:{name}{{[^}}]*}} (\S+)", text, re.M)
    assert found is not None, name
    return float(found[1])


async def stream(session: aiohttp.ClientSession, url: str, i: int, num_tokens: int) -> None:
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"Tell me story number {i}."}],
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "seed": i,
    }
    async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        async for _ in answer.content.iter_any():
            pass


async def measure(
    url: str, pid: int, clients: int, num_tokens: int, first: int
) -> dict[str, float]:
    """One round, whose stories are numbered from `first` on."""
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        names = ("generation_tokens_total", "python_cpu_seconds_total")
        before = [await metric(session, url, name) for name in names]
        cpu, clock = loop_seconds(pid), time.perf_counter()
        stories = range(first, first + clients)
        await asyncio.gather(*(stream(session, url, i, num_tokens) for i in stories))
        cpu, clock = loop_seconds(pid) - cpu, time.perf_counter() - clock
        after = [await metric(session, url, name) for name in names]
    tokens, python = (b - a for a, b in zip(before, after, strict=True))
    loop_us, engine_us = 1e6 * cpu / tokens, 1e6 * python / tokens
    return {
        "tokens_per_second": tokens / clock,
        "event_loop_us": loop_us,
        "engine_us": engine_us,
        "together_us": loop_us + engine_us,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args, options = parser.parse_known_args()

    server, url = start(args.model, options)
    results, first = [], 0
    try:
        asyncio.run(measure(url, server.pid, 2, 16, first))  # touches the memory
        names = f"{'event loop':>10} {'engine':>8} {'together':>9}"
        print(f"{'clients':>8} {'tokens/s':>9}   per token: {names}")
        for clients in map(int, args.clients.split(",")):
            rounds = []
            for _ in range(args.rounds):
                first += 1000
                rounds.append(asyncio.run(measure(url, server.pid, clients, args.tokens, first)))
            row = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            results.append({"clients": clients, **row})
            print(
                f"{clients:>8} {row['tokens_per_second']:>9.0f} {'':>13}"
                f"{row['event_loop_us']:>7.0f} µs {row['engine_us']:>5.0f} µs "
                f"{row['together_us']:>6.0f} µs"
            )
    finally:
        server.terminate()
        server.wait()
    print(json.dumps({"bench": "server", "model": Path(args.model).name, "results": results}))


if __name__ == "__main__":
    main()
