"""The native backend beside llama.cpp, on the same file, in one run: decode, decode far into a
context, prefill, decode of many sequences.

    scripts/bench peers MODEL.gguf … [--llama-bench PATH] [--llama-batched-bench PATH]
    [--vllm-python PATH] [--openvino-python PATH]
                        [--only SHAPE …] [--runs 3] [--threads 2] [--isa ISA]

Each shape is measured A B A B: ours, llama.cpp, ours, …; each pair gives a ratio, and the median
ratio is shown with the smallest and the largest. llama.cpp runs with flash attention on and off in
the first round; the better of the two is counted, and runs alone in the others. Both sides compute
logits and choose no token, keep the cache in float16, and take prompts in chunks of 512 tokens.
Decode of many sequences works as in llama-batched-bench: prompts of 64 tokens, then 32 steps. Our
side calls the backend directly with such batches. A peer whose program is not given is left out;
without any peer, only ours is measured. `--only` selects shapes by parts of their names.

"of roof" is the shortest possible time over the time taken, the smallest and the largest of the
rounds: the step's bytes at the read bandwidth measured just before each round, or its FLOPs at the
peaks of multiplying bytes and float32 with the multiplications by scales, whichever is longer
(pellucid/measure/hardware.py). "most" is the ratio that a backend at that roof would have.

vLLM and OpenVINO GenAI run after that, by `peers_python.py` in the environments of the interpreters
named: OpenVINO on the same file, vLLM on a model of the same shape with random weights in bfloat16.
They choose tokens greedily; ours runs once more after each of them.

Where anything else runs on the machine, put it behind with `chrt -r 10 scripts/bench peers …`
(real-time priority, which llama.cpp inherits); then use no more threads than there are cores. The
last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.costs import StepShape, entry_cost
from pellucid.batch import AttentionMetadata, ForwardBatch
from pellucid.config import ModelConfig
from pellucid.kv.layout import build_layout
from pellucid.kv.storage import KVStorage
from pellucid.kv_spec import build_kv_specs
from pellucid.measure.hardware import Ceilings, Range
from pellucid.measure.machine import ReadMeter, measure_ceilings
from pellucid.models.registry import get_graph
from pellucid.ops.cost import OpCost
from pellucid.ops.kv_dtypes import choose_kv_dtypes
from pellucid.weights.checkpoint import open_checkpoint

BLOCK_SIZE = 16
CHUNK = 512  # tokens of a prompt per step: llama.cpp's --ubatch-size
DECODE, DEEP_DECODE = 64, 32  # tokens decoded from an empty context, and behind a long one
DEPTH = 2048
PROMPTS = (512, 2048)
SEQUENCES, SEQUENCE_PROMPT, SEQUENCE_OUTPUT = (8, 32), 64, 32
# tokens in the cache, of all sequences
LONGEST = max(DEPTH + DEEP_DECODE, max(SEQUENCES) * (SEQUENCE_PROMPT + SEQUENCE_OUTPUT))


class Ours:
    """A model on the native backend; requests of equal length, each with its own part of a cache of
    `longest` tokens.
    """

    def __init__(self, path: Path, threads: int, isa: str | None, longest: int = LONGEST) -> None:
        backend = NativeBackend(isa, threads)
        with open_checkpoint(path) as checkpoint:
            self.config = checkpoint.config
            weights = {
                name: backend.load_weight(tensor) for name, tensor in checkpoint.parameters()
            }
            self._weight_bytes = sum(map(backend.weight_bytes, checkpoint.specs().values()))
        self.num_blocks = -(-longest // BLOCK_SIZE) + max(SEQUENCES)
        specs = build_kv_specs(self.config, *choose_kv_dtypes("auto", backend.kv_dtypes))
        layout = build_layout(specs, [backend.kv_token_bytes(spec) for spec in specs], BLOCK_SIZE)
        self._groups = len(layout.groups)
        storage = KVStorage(backend, layout, self.num_blocks * self._groups)
        forward = get_graph(self.config.graph).forward
        self._run = backend.build_forward(
            lambda ops, batch: forward(ops, self.config, weights, batch, storage.layers)
        )
        # the peaks stay; the bandwidth of all weights is read before each round
        self._peaks = measure_ceilings(
            backend.isa, backend.threads, working_sets=[1 << 20], seconds=0.2
        )
        self._meter = ReadMeter(backend.isa, backend.threads, self._weight_bytes)

    def ceilings(self) -> Ceilings:
        """The machine's ceilings now, with all weights as the working set."""
        reading = Range.of([self._meter.take()])
        return replace(self._peaks, read_bandwidth={self._weight_bytes: reading})

    def roof(self, requests: int, start: int, end: int, chunk: int, ceilings: Ceilings) -> float:
        """Tokens per second at most, of positions start … end - 1 of each request in steps of
        `chunk` tokens.
        """
        least = 0.0
        for first in range(start, end, chunk):
            last = min(first + chunk, end)
            step = StepShape((last - first,) * requests, (last,) * requests, requests)
            cost = sum((entry_cost(entry, step) for entry in self._run.entries), OpCost(0, 0, 0))
            least += ceilings.least_seconds(cost, self._weight_bytes)
        return requests * (end - start) / least

    def step(self, requests: int, start: int, tokens: int) -> None:
        """Positions start … start + tokens - 1 of each request."""
        width = self.num_blocks // requests
        # each group its own
        blocks = np.arange(self._groups * self.num_blocks, dtype=np.int32).reshape(self._groups, -1)
        # [G, R, M]
        tables = np.ascontiguousarray(blocks[:, : requests * width]).reshape(-1, requests, width)
        positions = np.tile(np.arange(start, start + tokens, dtype=np.int32), requests)  # [T]
        owner = np.repeat(np.arange(requests), tokens)
        metadata = AttentionMetadata(
            cu_seqlens_q=np.arange(requests + 1, dtype=np.int32) * np.int32(tokens),
            seq_lens=np.full(requests, start + tokens, np.int32),
            block_tables=tables,
            slot_mapping=(
                tables[:, owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
            ).astype(np.int32),
            block_size=BLOCK_SIZE,
        )
        input_ids = ((positions * 7919 + owner * 104729 + 13) % self.config.vocab_size).astype(
            np.int32
        )
        last = np.arange(1, requests + 1, dtype=np.int32) * np.int32(tokens) - np.int32(1)
        self._run(ForwardBatch(input_ids, positions, last, metadata))

    def prefill(self, requests: int, prompt: int) -> float:
        """Tokens per second; chunks of CHUNK tokens, all requests together."""
        chunk = CHUNK // requests
        start = time.perf_counter()
        for first in range(0, prompt, chunk):
            self.step(requests, first, min(chunk, prompt - first))
        return requests * prompt / (time.perf_counter() - start)

    def decode(self, requests: int, depth: int, output: int) -> float:
        """Tokens per second of all requests together, behind `depth` tokens that are computed
        before, untimed.
        """
        if depth:
            self.prefill(requests, depth)
        self.step(requests, depth, 1)  # wakes the threads, and warms what the first step finds cold
        start = time.perf_counter()
        for position in range(depth, depth + output):
            self.step(requests, position, 1)
        return requests * output / (time.perf_counter() - start)


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """Its two programs, on one model; a shape whose program is not named is not measured."""

    bench: str | None
    batched: str | None
    model: Path
    threads: int

    def prefill(self, prompt: int, flash: str) -> float:
        # which would run the whole prompt once more
        cold = ["--no-warmup"] if prompt > CHUNK else []
        return self._bench("-p", prompt, "-n", 0, "-fa", flash, *cold)

    def decode(self, depth: int, output: int, flash: str) -> float:
        return self._bench("-p", 0, "-n", output, "-d", depth, "-fa", flash)

    def decode_many(self, sequences: int, flash: str) -> float:
        context = sequences * (SEQUENCE_PROMPT + SEQUENCE_OUTPUT)
        lengths = [
            "-npp",
            SEQUENCE_PROMPT,
            "-ntg",
            SEQUENCE_OUTPUT,
            "-npl",
            sequences,
            "-c",
            context,
            "-b",
            2048,
            "-ub",
            CHUNK,
        ]
        out = _output(
            [
                self.batched,
                "-m",
                self.model,
                "-t",
                self.threads,
                "-fa",
                flash,
                "--output-format",
                "jsonl",
                *lengths,
            ]
        )
        rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
        return float(rows[-1]["speed_tg"])

    def _bench(self, *shape: str | int) -> float:
        out = _output(
            [
                self.bench,
                "-m",
                self.model,
                "-t",
                self.threads,
                "-r",
                1,
                "-ub",
                CHUNK,
                "-o",
                "json",
                *shape,
            ]
        )
        (run,) = json.loads(out)
        return float(run["avg_ts"])


VLLM_NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def vllm_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model of the same shape."""
    if config.rope is None or config.architecture not in VLLM_NAMES:
        raise ValueError(
            f"architecture is {config.architecture!r}; vLLM is measured on one of "
            f"{sorted(VLLM_NAMES)}"
        )
    gemma = config.architecture == "gemma3"
    found = {
        "architectures": [VLLM_NAMES[config.architecture]],
        "model_type": "gemma3_text" if gemma else config.architecture,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    if gemma:
        found |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": next(window for window in config.windows if window is not None),
            "layer_types": [
                "full_attention" if window is None else "sliding_attention"
                for window in config.windows
            ],
            "query_pre_attn_scalar": config.head_dim,
        }
    return found


def python_peer(name: str, python: str, path: Path, threads: int) -> dict[str, float]:
    """Tokens per second by shape, of one of peers_python's peers; of none, where it cannot run this
    model, and it is printed why.
    """
    script = Path(__file__).with_name("peers_python.py")
    try:
        found: dict[str, float] = json.loads(
            _output([python, script, name, path, threads]).splitlines()[-1]
        )
    except RuntimeError as error:
        print(f"{name} cannot run {path.name}: {error}", flush=True)
        return {}
    return found


def _output(command: list[Any]) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"{command[0]} ended with {done.returncode}: "
            f"{' '.join(done.stderr.strip().splitlines()[-3:])}"
        )
    return done.stdout


@dataclass(frozen=True, slots=True)
class Shape:
    """One row of the table: tokens per second of either side, and the most that the machine
    allows.
    """

    name: str
    ours: Callable[[], float]
    roof: Callable[[Ceilings], float]
    # by whether flash attention is on; None: that program is left out
    theirs: Callable[[str], float] | None


def shapes(ours: Ours, theirs: LlamaCpp) -> list[Shape]:
    def decode(
        name: str, requests: int, depth: int, output: int, peer: Callable[[str], float] | None
    ) -> Shape:
        run, roof = (
            partial(ours.decode, requests, depth, output),
            partial(ours.roof, requests, depth, depth + output, 1),
        )
        return Shape(name, run, roof, peer)

    one, many = theirs.bench is not None, theirs.batched is not None
    found = [
        decode(
            "decode, 1 sequence", 1, 0, DECODE, partial(theirs.decode, 0, DECODE) if one else None
        ),
        decode(
            f"decode at {DEPTH}",
            1,
            DEPTH,
            DEEP_DECODE,
            partial(theirs.decode, DEPTH, DEEP_DECODE) if one else None,
        ),
    ]
    for n in PROMPTS:
        peer = partial(theirs.prefill, n) if one else None
        found.append(
            Shape(
                f"prefill {n}",
                partial(ours.prefill, 1, n),
                partial(ours.roof, 1, 0, n, CHUNK),
                peer,
            )
        )
    for n in SEQUENCES:
        found.append(
            decode(
                f"decode, {n} sequences",
                n,
                SEQUENCE_PROMPT,
                SEQUENCE_OUTPUT,
                partial(theirs.decode_many, n) if many else None,
            )
        )
    return found


def measure(ours: Ours, shape: Shape, runs: int) -> dict[str, Any]:
    """The shape's row: every run of both sides, and the ratios of the pairs."""
    mine, roofs, peers, flash, tried = [], [], [], "", {}
    for i in range(runs):
        roofs.append(shape.roof(ours.ceilings()))
        mine.append(shape.ours())
        if shape.theirs is None:
            continue
        if i == 0:
            tried = {choice: shape.theirs(choice) for choice in ("on", "off")}
            flash = max(tried, key=lambda choice: tried[choice])
        peers.append(tried[flash] if i == 0 else shape.theirs(flash))
    row: dict[str, Any] = {"shape": shape.name, "pellucid": mine, "roof": roofs, "llama.cpp": peers}
    ratios = [a / b for a, b in zip(mine, peers, strict=True)] if peers else []
    return row | {"flash_attention": flash, "first_round": tried, "ratios": ratios}


HEADER = (
    f"{'':<22} {'pellucid':>9} {'of roof':>10} {'llama.cpp':>10} {'-fa':>4} {'most':>6}   "
    "ratio (least – largest)"
)


def line(row: dict[str, Any]) -> str:
    shares = [a / b for a, b in zip(row["pellucid"], row["roof"], strict=True)]
    share = f"{min(shares):.0%}–{max(shares):.0%}"
    mine = f"{row['shape']:<22} {statistics.median(row['pellucid']):>9.1f} {share:>10}"
    if not row["ratios"]:
        return mine
    peer, ratio = statistics.median(row["llama.cpp"]), statistics.median(row["ratios"])
    most = statistics.median(a / b for a, b in zip(row["roof"], row["llama.cpp"], strict=True))
    spread = f"({min(row['ratios']):.2f} – {max(row['ratios']):.2f})"
    return f"{mine} {peer:>10.1f} {row['flash_attention']:>4} {most:>6.2f}   {ratio:>5.2f} {spread}"


def beside_python_peer(
    name: str, speeds: dict[str, float], found: list[Shape], runs: int
) -> list[dict[str, Any]]:
    """Ours again on the shapes that the peer was measured on, right after it; printed."""
    rows = []
    for shape in found:
        if shape.name in speeds:
            mine = [shape.ours() for _ in range(runs)]
            row = {"shape": shape.name, "pellucid": mine, name: speeds[shape.name]}
            rows.append(row)
            speed = statistics.median(mine)
            print(
                f"{shape.name:<22} {speed:>9.1f} {name:>19} {speeds[shape.name]:>8.1f}   "
                f"{speed / speeds[shape.name]:>5.2f}",
                flush=True,
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument(
        "--llama-bench", metavar="PATH", help="without it, ours alone for one sequence"
    )
    parser.add_argument(
        "--llama-batched-bench", metavar="PATH", help="without it, ours alone for many"
    )
    parser.add_argument(
        "--vllm-python", metavar="PATH", help="the interpreter of an environment with vLLM for CPUs"
    )
    parser.add_argument(
        "--openvino-python",
        metavar="PATH",
        help="the interpreter of an environment with OpenVINO GenAI",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="SHAPE",
        default=[""],
        help="parts of the names of shapes  [default: all]",
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", help="of ours  [default: the best]")
    args = parser.parse_args()

    results = []
    for path in args.models:
        ours = Ours(path, args.threads, args.isa)
        ours.prefill(1, CHUNK)  # the first run pays for memory that is touched for the first time
        theirs = LlamaCpp(args.llama_bench, args.llama_batched_bench, path, args.threads)
        print(
            f"\n{path.name}, {args.threads} threads; tokens/s, medians of {args.runs}\n{HEADER}",
            flush=True,
        )
        found = shapes(ours, theirs)
        for shape in found:
            if any(part in shape.name for part in args.only):
                row = measure(ours, shape, args.runs)
                print(line(row), flush=True)
                results.append({"model": path.name, **row})
        if args.openvino_python is not None:
            speeds = python_peer("openvino", args.openvino_python, path, args.threads)
            results += [
                {"model": path.name, **row}
                for row in beside_python_peer("openvino", speeds, found, args.runs)
            ]
        if args.vllm_python is not None:
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, "config.json").write_text(json.dumps(vllm_config(ours.config)))
                speeds = python_peer("vllm", args.vllm_python, Path(folder), args.threads)
            results += [
                {"model": path.name, **row}
                for row in beside_python_peer("vllm", speeds, found, args.runs)
            ]
    print(
        json.dumps(
            {"bench": "peers", "threads": args.threads, "runs": args.runs, "results": results}
        )
    )


if __name__ == "__main__":
    main()
