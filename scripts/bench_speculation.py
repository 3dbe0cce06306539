"""Speculation beside plain decoding, in turns: four workloads, several numbers of sequences.

    scripts/bench speculation MODEL [--methods auto] [--sequences 1 4] [--tokens 200] [--rounds 2]
        [--workloads edit continue summarize prose switch] [--llama-server BIN [ARGUMENTS]]

edit: give a file back with one name changed. continue: go on with a program. summarize: sum up a
given text. prose: answer a question freely. switch: code, prose and code in one answer, where the
model follows. All answers are greedy and of `--tokens` tokens; all prompts are computed before the
clock starts. The answers of every method must be those of plain decoding, token by token.

The table has decode tokens/s (medians), their ratio to plain decoding, the share of drafts that
were accepted, tokens per step, and the speed-up that the formula E / v predicts: E the tokens per
step, and v the mean cost of a step's rows as the governor measured it. With --llama-server, its own
tokens/s for the same prompts and file stand beside, plain and with its arguments. The last line is
JSON.
"""

import argparse
import json
import shlex
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pellucid import EngineConfig, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.prompts import TokenizedPrompt, tokenize_chat
from pellucid.units import format_count
from pellucid.weights.hub import resolve_model

SOURCES = Path(__file__).parents[1] / "src" / "pellucid"
FILES = ("kv/node.py", "kv/second_tier.py", "units.py", "scheduler/events.py", "kv/block_pool.py")
QUESTIONS = (
    "Why is the sky blue, and why are sunsets red?",
    "Tell a short story about a lighthouse keeper who finds a letter.",
    "What should a visitor know about the history of Lisbon?",
    "How does bread rise, and what does salt do to the dough?",
)


def build_prompts(model: OpenModel, workload: str, count: int) -> list[list[int]]:
    """Token ids of `count` different prompts."""
    prompts = []
    for i in range(count):
        text = (SOURCES / FILES[i % len(FILES)]).read_text()[: 2400 - 40 * (i // len(FILES))]
        if workload == "continue":
            prompts.append(model.tokenizer.encode(text[: 1200 + 40 * i]))
            continue
        asked = {
            "edit": f"```python\n{text}\n```\nGive back this whole file, with `block` renamed to "
            "`page` everywhere. Answer with the code only.",
            "summarize": f"{_prose(i)}\n\nSum up this text in a few sentences.",
            "prose": QUESTIONS[i % len(QUESTIONS)] + " " * (i // len(QUESTIONS)),
            "switch": f"```python\n{text}\n```\nFirst give back this file unchanged. Then write a "
            "poem about the sea. Then give back the file once more.",
        }[workload]
        messages = [{"role": "user", "content": asked}]
        prompts.append(tokenize_chat(model.tokenizer, messages).token_ids)
    return prompts


def _prose(i: int) -> str:
    """Some paragraphs of the project's own documents."""
    text = (SOURCES.parents[1] / "docs" / "decisions.md").read_text()
    return text[3000 * i + 2000 : 3000 * i + 4600]


@dataclass
class Run:
    """What one run gave."""

    seconds: float
    num_tokens: int
    answers: list[list[int]]
    accepted: float  # of drafted
    per_step: float
    predicted: float  # speed-up
    worst_window: float = 0.0  # tokens/s of the slowest 256 tokens


def run_ours(
    model: OpenModel, method: str | None, prompts: Sequence[list[int]], tokens: int
) -> Run:
    """Compute the prompts, then time the rest."""
    config = EngineConfig(speculative=method, max_num_seqs=max(1, len(prompts)), max_model_len=4096)
    core = model.build_engine(config).core
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    core.add_requests(
        [Submission(f"r{i}", TokenizedPrompt(p, None), params) for i, p in enumerate(prompts)]
    )
    # Prefill. What is decoded meanwhile is not timed.
    while not all(r.is_decoding for r in core.scheduler.running) or len(core.scheduler.waiting):
        core.step()
    before = core.stats().num_output_tokens
    start = time.perf_counter()
    done = {}
    times = [(0.0, before)]  # of each step: seconds and tokens
    while core.has_unfinished:
        for output in core.step():
            done[output.request_id] = output
        num_tokens = sum([len(o.outputs[0].token_ids) for o in done.values()])
        times.append((time.perf_counter() - start, num_tokens))
    seconds = time.perf_counter() - start
    stats = core.stats()
    receipt, accepted, per_step, predicted = stats.speculation, 0.0, 1.0, 1.0
    if receipt is not None and receipt.num_draft_tokens:
        accepted = receipt.num_accepted_tokens / receipt.num_draft_tokens
        per_step = receipt.tokens_per_step or 1.0
        predicted = (seconds + receipt.seconds_saved / len(prompts)) / seconds
    return Run(
        seconds,
        stats.num_output_tokens - before,
        [done[f"r{i}"].outputs[0].token_ids for i in range(len(prompts))],
        accepted,
        per_step,
        predicted,
        _worst_window(times),
    )


def _worst_window(times: Sequence[tuple[float, int]], length: int = 256) -> float:
    """Tokens/s of the slowest `length` tokens in a row."""
    worst, j = float("inf"), 0
    for i, (start, first) in enumerate(times):
        while j < len(times) and times[j][1] - first < length:
            j += 1
        if j == len(times):
            break
        if j > i:
            worst = min(worst, (times[j][1] - first) / (times[j][0] - start))
    return worst if worst < float("inf") else times[-1][1] / max(times[-1][0], 1e-9)


@contextmanager
def llama_server(binary: Path, model: Path, parallel: int, arguments: str) -> Iterator[int]:
    """A server on a free port, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(binary), "-m", str(model), "--port", str(port), "-np", str(parallel)]
    command += ["-c", str(4096 * parallel), "-t", "2", *shlex.split(arguments)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait()


def run_llama(port: int, prompts: Sequence[list[int]], tokens: int) -> float:
    """Decode tokens/s of all prompts together, by the server's own clock."""

    def ask(prompt: list[int], n: int) -> float:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion",
            json.dumps(body | {"cache_prompt": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            timings = json.load(response)["timings"]
        return float(timings["predicted_ms"]) / 1e3

    with ThreadPoolExecutor(len(prompts)) as pool:
        list(pool.map(lambda p: ask(p, 1), prompts))  # compute the prompts
        seconds = max(pool.map(lambda p: ask(p, tokens), prompts))
    return len(prompts) * tokens / seconds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="+", default=["auto"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4])
    parser.add_argument(
        "--workloads", nargs="+", default=["edit", "continue", "summarize", "prose"]
    )
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama-server", nargs="+", metavar="BIN")
    args = parser.parse_args()

    report: list[dict[str, float | int | str]] = []
    path = resolve_model(args.model)
    print(
        f"{'workload':<10} {'seqs':>4} {'method':>8} {'tok/s':>8} {'ratio':>6} {'formula':>8} "
        f"{'accepted':>9} {'per step':>9} {'worst 256':>10}"
    )
    with open_model(path) as model:
        for workload in args.workloads:
            for count in args.sequences:
                prompts = build_prompts(model, workload, count)
                runs: dict[str, list[Run]] = {}
                for _ in range(args.rounds):
                    for method in ("plain", *args.methods):
                        name = None if method == "plain" else method
                        run = run_ours(model, name, prompts, args.tokens)
                        runs.setdefault(method, []).append(run)
                plain = runs["plain"]
                for method, of_method in runs.items():
                    if of_method[0].answers != plain[0].answers:
                        raise AssertionError(f"{method} changed an answer of {workload}")
                    rate = statistics.median(r.num_tokens / r.seconds for r in of_method)
                    ratio = rate / statistics.median(r.num_tokens / r.seconds for r in plain)
                    last = of_method[-1]
                    worst = statistics.median(r.worst_window for r in of_method)
                    print(
                        f"{workload:<10} {count:>4} {method:>8} {rate:>8.1f} {ratio:>6.2f} "
                        f"{last.predicted:>8.2f} {last.accepted:>9.0%} {last.per_step:>9.2f} "
                        f"{worst:>10.1f}",
                        flush=True,
                    )
                    report.append(
                        {
                            "workload": workload, "sequences": count, "method": method,
                            "tokens_per_second": rate, "ratio": ratio,
                            "predicted": last.predicted, "accepted": last.accepted,
                            "tokens_per_step": last.per_step, "worst_window": worst,
                        }
                    )  # fmt: skip
                if args.llama_server:
                    binary, arguments = Path(args.llama_server[0]), args.llama_server[1:]
                    for extra in ("", *arguments):
                        with llama_server(binary, path, count, extra) as port:
                            rate = statistics.median(
                                run_llama(port, prompts, args.tokens) for _ in range(args.rounds)
                            )
                        name = f"llama-server {extra}".strip()
                        print(f"{workload:<10} {count:>4} {rate:>17.1f}  {name}", flush=True)
                        report.append(
                            {"workload": workload, "sequences": count, "method": name,
                             "tokens_per_second": rate}
                        )  # fmt: skip
    print(f"the answers of {format_count(len(args.methods), 'method')} are those of plain decoding")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
