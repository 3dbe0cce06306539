"""Speculation beside plain decoding, in turns: four workloads, several numbers of sequences.

    scripts/bench speculation MODEL [--methods ngram auto draft:MODEL] [--sequences 1 4]
        [--workloads edit continue summarize prose random switch] [--prompts 4] [--tokens 128]
        [--rounds 2] [--llama-server BIN [ARGUMENTS]]

edit: give a file back with one name changed. continue: go on with a program. summarize: sum up a
given text. prose: answer a question freely. random: a prompt of random tokens. switch: code, prose
and code in one answer, where the model follows. All answers are greedy and of `--tokens` tokens;
all prompts are computed before the clock starts. With one sequence, `--prompts` prompts run one
after the other. The answers of every method must be those of plain decoding, token by token.

First comes v(b): the median time of a step of b rows beside one without drafts, on these prompts.
The table has decode tokens/s (medians), their ratio to plain decoding, the speed-up that the
formula predicts, the ceiling, the share of drafts that were accepted, tokens per step, and the
slowest 256 tokens beside the slowest of plain decoding. The formula is E / (v + c): E the tokens
per step, v the mean of v(b) over the steps' rows, c the time of proposers, in plain steps. The
ceiling is the speed-up of a governor that knows v(b) and which draft tokens are right: it verifies
no wrong one, and as many right ones as give the most tokens per second. Only proposers without a
model have one. For `switch`, a line shows the mean number of drafts in a step, for each 32 tokens
of an answer. A llama-server takes turns with our methods on the same prompts, plain and with each
of its arguments; its ratio is to our plain decoding too. The last line is JSON.
"""

import argparse
import json
import random
import shlex
import socket
import statistics
import subprocess
import time
import urllib.request
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import repeat, takewhile
from pathlib import Path
from typing import Any

from pellucid import EngineConfig, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.prompts import TokenizedPrompt, tokenize_chat
from pellucid.request import Request
from pellucid.speculative import Speculation, build_proposers
from pellucid.speculative.governor import VerifyAll
from pellucid.speculative.methods import METHODS
from pellucid.speculative.proposer import Draft, Proposer
from pellucid.speculative.speculation import MAX_DRAFT_TOKENS
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
FEW_DRAFTS = (0, 1, 2, 3, 4, 5, 7, 11, 15)  # of a step: they are timed for v(b)
DRAFTS_PER_REQUEST = (1, 2, 3, 7, 15)  # these too, where several requests run
MOST_ROWS = 80
ROW_ROUNDS = 7
WINDOW = 256  # tokens
BIN = 32  # tokens of the switch's timeline


def build_prompts(model: OpenModel, workload: str, count: int) -> list[list[int]]:
    """Token ids of `count` different prompts."""
    prompts = []
    for i in range(count):
        if workload == "random":
            rng = random.Random(i)
            vocab_size = model.model_config.vocab_size
            prompts.append([rng.randrange(vocab_size) for _ in range(400)])
            continue
        length = 2400 if count <= 4 else 1000  # characters
        text = (SOURCES / FILES[i % len(FILES)]).read_text()[: length - 40 * (i // len(FILES))]
        if workload == "continue":
            prompts.append(model.tokenizer.encode(text[: length // 2 + 40 * (i % 5)]))
            continue
        asked = {
            "edit": f"```python\n{text}\n```\nGive back this whole file, with `block` renamed to "
            "`page` everywhere. Answer with the code only.",
            "summarize": f"{_prose(i)[:length]}\n\nSum up this text in a few sentences.",
            "prose": QUESTIONS[i % len(QUESTIONS)] + " " * (i // len(QUESTIONS)),
            "switch": f"```python\n{text[:1200]}\n```\nFirst give back this file unchanged. Then "
            "write a poem about the sea. Then give back the file once more.",
        }[workload]
        messages = [{"role": "user", "content": asked}]
        prompts.append(tokenize_chat(model.tokenizer, messages).token_ids)
    return prompts


def build_groups(model: OpenModel, workload: str, count: int, most: int) -> list[list[list[int]]]:
    """Prompts that run together; with one sequence, `most` prompts one after the other."""
    prompts = build_prompts(model, workload, max(count, most))
    return [[p] for p in prompts] if count == 1 else [prompts[:count]]


def _prose(i: int) -> str:
    """Some paragraphs of the project's own documents."""
    text = (SOURCES.parents[1] / "docs" / "decisions.md").read_text()
    return text[3000 * i + 2000 : 3000 * i + 4600]


# ---- our engine


@dataclass
class Run:
    """What one run gave."""

    seconds: float = 0.0
    num_tokens: int = 0
    answers: list[list[int]] = field(default_factory=list)
    num_drafted: int = 0
    num_accepted: int = 0
    num_request_steps: int = 0
    predicted_seconds: float = 0.0
    worst_window: float = 0.0  # tokens/s of the slowest 256 tokens
    timeline: list[tuple[int, int]] = field(default_factory=list)  # tokens so far, drafts


class Bench:
    """One engine, whose speculation is changed between runs. Prompts stay in its prefix cache."""

    def __init__(self, model: OpenModel, count: int, draft: str | None) -> None:
        config = EngineConfig(
            speculative=draft, max_num_seqs=max(2, count), max_model_len=4096, seed=0
        )
        self._model = model
        self._draft = draft
        self.core: EngineCore = model.build_engine(config).core
        self._proposers = [] if self.core.speculation is None else self.core.speculation.proposers
        self._of_method: dict[str, Speculation | None] = {}

    def begin_round(self, methods: Sequence[str]) -> None:
        """Begin anew: nothing is learned from earlier rounds."""
        vocab_size = self._model.model_config.vocab_size
        for method in methods:
            proposers: list[Proposer] = []
            if method == self._draft:
                # A new lookup too: the old one remembers the answers of earlier rounds.
                models = [proposer for proposer in self._proposers if not proposer.is_free]
                proposers = [*build_proposers("auto"), *models]
            elif method != "plain":
                proposers = build_proposers(method)
            self._of_method[method] = Speculation(proposers, vocab_size) if proposers else None

    def _begin(self, group: Sequence[list[int]], tokens: int) -> None:
        """Compute the prompts."""
        core = self.core
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        core.add_requests(
            [Submission(f"r{i}", TokenizedPrompt(p, None), params) for i, p in enumerate(group)]
        )
        while not all(r.is_decoding for r in core.scheduler.running) or len(core.scheduler.waiting):
            core.step()

    def run(
        self, method: str, group: Sequence[list[int]], tokens: int, row_seconds: Mapping[int, float]
    ) -> Run:
        """Run these together. `row_seconds`: of steps, by their drafts."""
        run = Run()
        core = self.core
        core.speculation = None
        self._begin(group, tokens)
        speculation = core.speculation = self._of_method[method]
        before = None if speculation is None else speculation.receipt()
        done = {}
        count = sum([len(r.output_token_ids) for r in core.scheduler.running])
        times = [(0.0, count)]  # of each step: seconds and tokens
        first = count
        start = time.perf_counter()
        while core.has_unfinished:
            running = list(core.scheduler.running)
            count -= sum([len(r.output_token_ids) for r in running])
            for output in core.step():
                done[output.request_id] = output
            count += sum([len(r.output_token_ids) for r in running])
            times.append((time.perf_counter() - start, count))
            drafts = sum([r.num_scheduled_tokens - 1 for r in running])
            run.timeline.append((count, drafts))
            run.predicted_seconds += _step_seconds(row_seconds, drafts, len(running), len(group))
            run.num_request_steps += len(running)
        run.seconds, run.num_tokens = times[-1][0], count - first
        run.answers = [list(done[f"r{i}"].outputs[0].token_ids) for i in range(len(group))]
        run.worst_window = _worst_window(times)
        if speculation is not None and before is not None:
            receipt = speculation.receipt()
            run.num_drafted = receipt.num_draft_tokens - before.num_draft_tokens
            run.num_accepted = receipt.num_accepted_tokens - before.num_accepted_tokens
            run.predicted_seconds += receipt.draft_seconds - before.draft_seconds
        return run

    def measure_rows(self, group: Sequence[list[int]]) -> dict[int, float]:
        """Median seconds of a step, by its drafts. All drafts are wrong."""
        wrong = _Wrong()
        counts = _draft_counts(len(group))
        self.core.speculation = None
        self._begin(group, 2 + ROW_ROUNDS * len(counts))
        vocab_size = self._model.model_config.vocab_size
        self.core.speculation = Speculation([wrong], vocab_size, governor=VerifyAll())
        seconds: dict[int, list[float]] = {k: [] for k in counts}
        rng = random.Random(0)
        for _ in range(ROW_ROUNDS):
            # in any order, so that no number of rows always follows the same
            for wrong.count in rng.sample(counts, len(counts)):
                start = time.perf_counter()
                self.core.step()
                seconds[wrong.count].append(time.perf_counter() - start)
        for i in range(len(group)):
            self.core.abort(f"r{i}")
        return {k: statistics.median(times) for k, times in seconds.items()}


class _Wrong:
    """Drafts `count` tokens in all: each the first of the prompt, which is hardly ever right."""

    name, priors, is_free = "wrong", (0.5,), True
    count = 0

    def propose(self, requests: Sequence[Request], limit: int) -> dict[str, Draft]:
        """See Proposer."""
        each, more = divmod(self.count, len(requests))
        lengths = [each + (i < more) for i in range(len(requests))]
        return {
            r.request_id: Draft([r.prompt_token_ids[0]] * n, [0] * n)
            for r, n in zip(requests, lengths, strict=True)
        }

    def finish(self, request: Request) -> None:
        """Nothing is kept."""


def _draft_counts(num_requests: int) -> list[int]:
    """The numbers of drafts in a step that are timed."""
    many = [k * num_requests for k in DRAFTS_PER_REQUEST if (k + 1) * num_requests <= MOST_ROWS]
    return sorted({*FEW_DRAFTS, num_requests, *many})


def _step_seconds(
    row_seconds: Mapping[int, float], drafts: int, num_requests: int, size: int
) -> float:
    """What a step takes by the table of `size` requests, when `num_requests` of them still run."""
    known = list(row_seconds)
    i = min(max(1, bisect_left(known, drafts)), len(known) - 1)
    low, high = known[i - 1], known[i]
    slope = (row_seconds[high] - row_seconds[low]) / (high - low)
    # requests that have ended make a step cheaper, as fewer drafts do
    ended = (size - num_requests) / size * (row_seconds[size] - row_seconds[0])
    return row_seconds[low] + slope * (drafts - low) - ended


def find_ceiling(
    method: str,
    groups: Sequence[Sequence[list[int]]],
    answers: Sequence[Sequence[list[int]]],
    row_seconds: Mapping[int, float],
) -> float:
    """The speed-up of these answers, if a governor knew `row_seconds` and which drafts are right.
    It is replayed, without the model.
    """
    proposers, plain, seconds = build_proposers(method), 0.0, 0.0
    params = SamplingParams(temperature=0, ignore_eos=True)
    for prompts, given in zip(groups, answers, strict=True):
        left = {}  # request_id -> the request and its whole answer
        for i, (prompt, answer) in enumerate(zip(prompts, given, strict=True)):
            request = Request(request_id=f"r{i}", prompt_token_ids=prompt, params=params, seed=0)
            request.output_token_ids = answer[:1]
            left[f"r{i}"] = request, answer
        plain += row_seconds[0] * (len(given[0]) - 1)
        while left:
            # How many tokens of each request's best draft are right?
            right = dict.fromkeys(left, 0)
            for proposer in proposers:
                drafts = proposer.propose([r for r, _ in left.values()], MAX_DRAFT_TOKENS)
                for name, draft in drafts.items():
                    request, answer = left[name]
                    rest = answer[len(request.output_token_ids) : -1]
                    pairs = zip(draft.token_ids, rest, strict=False)
                    agreed = list(takewhile(lambda pair: pair[0] == pair[1], pairs))
                    right[name] = max(right[name], len(agreed))
            # Verify as many as give the most tokens per second, of the shortest answers first.
            costs = [
                _step_seconds(row_seconds, k, len(left), len(prompts))
                for k in range(sum(right.values()) + 1)
            ]
            best = max(range(len(costs)), key=lambda k: (len(left) + k) / costs[k])
            seconds += costs[best]
            for name, (request, answer) in sorted(
                left.items(), key=lambda item: len(item[1][0].output_token_ids)
            ):
                count = min(best, right[name])
                best -= count
                known = len(request.output_token_ids)
                request.output_token_ids += answer[known : known + 1 + count]
                if len(request.output_token_ids) == len(answer):
                    del left[name]
                    for proposer in proposers:
                        proposer.finish(request)
    return plain / seconds


def _worst_window(times: Sequence[tuple[float, int]]) -> float:
    """Tokens/s of the slowest `WINDOW` tokens in a row; of all, if there are fewer."""
    worst, j = float("inf"), 0
    for start, first in times:
        while j < len(times) and times[j][1] - first < WINDOW:
            j += 1
        if j == len(times):
            break
        worst = min(worst, (times[j][1] - first) / (times[j][0] - start))
    if worst < float("inf"):
        return worst
    return (times[-1][1] - times[0][1]) / max(times[-1][0], 1e-9)


def _sum_medians(of_groups: Sequence[Sequence[Run]], name: str) -> float:
    """Of each group the median over its runs, added up."""
    return sum([float(statistics.median(getattr(run, name) for run in runs)) for runs in of_groups])


def _show_timeline(run: Run) -> str:
    """The mean number of drafts in a step, for each `BIN` tokens."""
    bins: dict[int, list[int]] = {}
    for count, drafts in run.timeline:
        bins.setdefault(count // BIN, []).append(drafts)
    return " ".join(f"{statistics.mean(bins[b]):.0f}" for b in sorted(bins))


# ---- llama.cpp


@contextmanager
def llama_server(binary: str, model: Path, parallel: int, arguments: str) -> Iterator[int]:
    """A server on a free port, ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [binary, "-m", str(model), "--port", str(port), "-np", str(parallel)]
    command += ["-c", str(2048 * parallel), "-t", "2", *shlex.split(arguments)]
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


def run_llama(port: int, group: Sequence[list[int]], tokens: int) -> float:
    """Decode tokens/s of these prompts together, by the server's own clock."""

    def ask(slot: int, n: int) -> float:
        body = {"prompt": group[slot], "n_predict": n, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/completion",
            json.dumps(body | {"cache_prompt": True, "id_slot": slot}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as response:
            timings = json.load(response)["timings"]
        return float(timings["predicted_ms"]) / 1e3

    slots = range(len(group))
    with ThreadPoolExecutor(len(group)) as pool:
        list(pool.map(ask, slots, repeat(1)))  # compute the prompts
        return tokens * len(group) / max(pool.map(ask, slots, repeat(tokens)))


# ---- the table


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("model")
    parser.add_argument("--methods", nargs="*", default=["auto"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4])
    workloads = ["edit", "continue", "summarize", "prose"]
    parser.add_argument("--workloads", nargs="+", default=workloads)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--llama-server", nargs="+", default=[], metavar="BIN")
    args = parser.parse_args()

    report: list[dict[str, Any]] = []
    path = resolve_model(args.model)
    with open_model(path) as model:
        for count in args.sequences:
            bench = Bench(model, count, next((m for m in args.methods if "draft:" in m), None))
            with ExitStack() as servers:
                ports = {}
                for extra in ["", *args.llama_server[1:]] if args.llama_server else []:
                    server = llama_server(args.llama_server[0], path, count, extra)
                    ports[f"llama-server {extra}".strip()] = servers.enter_context(server)
                for workload in args.workloads:
                    groups = build_groups(model, workload, count, args.prompts)
                    report += compare_methods(bench, ports, workload, groups, args)
            del bench
    print(f"the answers of {format_count(len(args.methods), 'method')} are those of plain decoding")
    print(json.dumps(report))


def compare_methods(
    bench: Bench,
    ports: Mapping[str, int],
    workload: str,
    groups: Sequence[Sequence[list[int]]],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Run all methods, and llama-server at these ports, in turns, and print their rows."""
    count = len(groups[0])
    row_seconds = bench.measure_rows(groups[0])
    v = {k: seconds / row_seconds[0] for k, seconds in row_seconds.items()}
    shown = "  ".join(f"{count + k}: {ratio:.2f}" for k, ratio in v.items())
    print(
        f"\n{workload}, {format_count(count, 'sequence')}. A plain step: "
        f"{1e3 * row_seconds[0]:.2f} ms. v(b): {shown}"
    )
    print(
        f"{'workload':<10} {'seqs':>4} {'method':>14} {'tok/s':>8} {'ratio':>6} {'formula':>8} "
        f"{'ceiling':>8} {'accepted':>9} {'per step':>9} {'worst 256':>10}"
    )
    # Run them in turns, every second time in reverse: what runs first finds cold caches.
    methods = ("plain", *args.methods)
    runs: dict[str, list[list[Run]]] = {method: [[] for _ in groups] for method in methods}
    rates: dict[str, list[list[float]]] = {name: [[] for _ in groups] for name in ports}
    for i in range(args.rounds):
        bench.begin_round(methods)
        for j, group in enumerate(groups):
            for name in (*methods, *ports)[:: -1 if (i + j) % 2 else 1]:
                if name in ports:
                    rates[name][j].append(run_llama(ports[name], group, args.tokens))
                    time.sleep(1)  # its threads may go on spinning
                else:
                    runs[name][j].append(bench.run(name, group, args.tokens, row_seconds))
    # Compare them: for each group, the median of the rounds.
    report: list[dict[str, Any]] = []
    plain_rate = plain_worst = plain_predicted = 0.0
    for method, of_method in runs.items():
        for of_group, of_plain in zip(of_method, runs["plain"], strict=True):
            if any(run.answers != of_plain[0].answers for run in of_group):
                raise AssertionError(f"{method} changed an answer of {workload}")
        all_runs = [run for of_group in of_method for run in of_group]
        num_tokens = sum([of_group[0].num_tokens for of_group in of_method])
        rate = num_tokens / _sum_medians(of_method, "seconds")
        predicted = _sum_medians(of_method, "predicted_seconds")
        worst = _sum_medians(of_method, "worst_window")
        if method == "plain":
            plain_rate, plain_predicted, plain_worst = rate, predicted, worst
        drafted = sum([run.num_drafted for run in all_runs])
        accepted = sum([run.num_accepted for run in all_runs]) / max(1, drafted)
        steps = sum([run.num_request_steps for run in all_runs])
        per_step = sum([run.num_tokens for run in all_runs]) / steps
        predicted, worst = plain_predicted / predicted, worst / plain_worst
        ceiling = None
        if method in METHODS:
            answers = [of_group[0].answers for of_group in runs["plain"]]
            ceiling = find_ceiling(method, groups, answers, row_seconds)
        print(
            f"{workload:<10} {count:>4} {method.rpartition('/')[2][:14]:>14} {rate:>8.1f} "
            f"{rate / plain_rate:>6.2f} {predicted:>8.2f} "
            f"{'' if ceiling is None else f'{ceiling:.2f}':>8} {accepted:>9.0%} "
            f"{per_step:>9.2f} {worst:>10.2f}",
            flush=True,
        )
        if workload == "switch" and method != "plain":
            print(f"drafts in a step, for each {BIN} tokens: {_show_timeline(of_method[0][-1])}")
        report.append(
            {
                "workload": workload, "sequences": count, "method": method,
                "tokens_per_second": rate, "ratio": rate / plain_rate, "predicted": predicted,
                "ceiling": ceiling, "accepted": accepted, "tokens_per_step": per_step,
                "worst_window": worst, "v": shown,
            }
        )  # fmt: skip
    for name, of_groups in rates.items():
        rate = statistics.harmonic_mean([statistics.median(r) for r in of_groups])
        print(f"{workload:<10} {count:>4} {rate:>23.1f} {rate / plain_rate:>6.2f}  {name}")
        cell = {"workload": workload, "sequences": count, "method": name}
        report.append(cell | {"tokens_per_second": rate})
    return report


if __name__ == "__main__":
    main()
