"""The whole engine under load: scripts/bench engine MODEL.gguf [--only NAME …]
[--llama-batched-bench PATH].

    overhead    decode of 1, 8 and 32 sequences: tokens/s, and the share of the time that the bare
                backend takes for the same steps
    batching    64 requests (prompts of 32–512, outputs of 16–256 tokens): static, dynamic and
                continuous batching, and static batching with padding to the longest, of which only
                the useful tokens count; beside llama-batched-bench with the mean lengths and the
                same number of sequences
    prefix      200 requests that share a system prompt of 1,000 tokens: with and without the radix
                tree
    preemption  the requests of `batching` in a quarter of the cache that they need: recompute and
                swap; the tokens must be the same

The load is drawn from a seed. All requests arrive at once and ignore end-of-sequence tokens, so the
work does not depend on the model's output.
"""

import argparse
import json
import random
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pellucid import LLM, EngineConfig, RequestOutput, SamplingParams
from pellucid.engine.loader import open_model

NUM_SEQS = 32  # at once
MIXED, PROMPTS, OUTPUTS = 64, (32, 512), (16, 256)
SHARED, SYSTEM_PROMPT, QUESTION, ANSWER = 200, 1000, (8, 40), 16
MAX_MODEL_LEN = 1280


@dataclass(frozen=True)
class Load:
    """Requests: the prompt's token ids, and the number of tokens to generate."""

    prompts: list[list[int]]
    outputs: list[int]

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.prompts)) + sum(self.outputs)


@dataclass(frozen=True)
class Run:
    """The result of a load."""

    seconds: float
    outputs: list[RequestOutput]
    forward_seconds: float
    num_preemptions: int
    cached_share: float

    @property
    def token_ids(self) -> list[list[int]]:
        return [o.outputs[0].token_ids for o in self.outputs]

    @property
    def ttft(self) -> float:
        waited: list[float] = [
            (o.metrics.first_token_time or 0) - o.metrics.arrival_time for o in self.outputs
        ]
        return statistics.median(waited)


def mixed_load(vocab: int, requests: int) -> Load:
    rng = random.Random(1)
    lengths = [(rng.randint(*PROMPTS), rng.randint(*OUTPUTS)) for _ in range(requests)]
    return Load([_tokens(rng, vocab, n) for n, _ in lengths], [m for _, m in lengths])


def padded_load(load: Load, vocab: int) -> Load:
    """What a batch of request-level batching computes (Yu et al., Orca, OSDI 2022, §3): all as long
    as its longest prompt and answer.
    """
    rng = random.Random(4)
    prompts, outputs = [], []
    for first in range(0, len(load.prompts), NUM_SEQS):
        group = load.prompts[first : first + NUM_SEQS]
        longest = max(map(len, group))
        prompts += [prompt + _tokens(rng, vocab, longest - len(prompt)) for prompt in group]
        outputs += [max(load.outputs[first : first + NUM_SEQS])] * len(group)
    return Load(prompts, outputs)


def shared_load(vocab: int, requests: int) -> Load:
    rng = random.Random(2)
    system = _tokens(rng, vocab, SYSTEM_PROMPT)
    return Load(
        [system + _tokens(rng, vocab, rng.randint(*QUESTION)) for _ in range(requests)],
        [ANSWER] * requests,
    )


def _tokens(rng: random.Random, vocab: int, count: int) -> list[int]:
    return [rng.randrange(vocab // 2) for _ in range(count)]


def run(path: Path, load: Load, **options: Any) -> Run:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in load.outputs]
    options |= {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": NUM_SEQS}
    with LLM(path, speculative=None, **options) as llm:
        # touch all memory first
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2), use_tqdm=False)
        before, start = llm.stats(), time.perf_counter()
        outputs = llm.generate(load.prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        stats = llm.stats()
    return Run(
        seconds,
        outputs,
        stats.all_steps.forward - before.all_steps.forward,
        stats.num_preemptions,
        stats.num_cached_tokens / stats.num_prompt_tokens,
    )


def overhead(path: Path, vocab: int) -> dict[str, Any]:
    result = {}
    for sequences in (1, 8, NUM_SEQS):
        rng = random.Random(3)
        load = Load([_tokens(rng, vocab, 16) for _ in range(sequences)], [96] * sequences)
        r = run(path, load)
        speed, share = sum(load.outputs) / r.seconds, r.forward_seconds / r.seconds
        result[str(sequences)] = {"tokens_per_second": speed, "share_of_backend": share}
        print(
            f"decode, {sequences:2} sequences: {speed:7.0f} tok/s, {share:6.1%} of the time in "
            "the backend"
        )
    return result


def batching(path: Path, load: Load, vocab: int, llama: Path | None) -> dict[str, Any]:
    result: dict[str, Any] = {}
    # padded: only the useful tokens count
    for way in ("padded", "static", "dynamic", "continuous"):
        r = (
            run(path, padded_load(load, vocab), batching="static")
            if way == "padded"
            else run(path, load, batching=way)
        )
        result[way] = {
            "seconds": r.seconds,
            "tokens_per_second": load.num_tokens / r.seconds,
            "ttft": r.ttft,
        }
        print(
            f"{way:10} {r.seconds:7.1f} s  {load.num_tokens / r.seconds:7.0f} tok/s (prompt and "
            f"output)  median TTFT {r.ttft:6.2f} s"
        )
    result["ratio_to_static"] = result["static"]["seconds"] / result["continuous"]["seconds"]
    result["ratio_to_padded"] = result["padded"]["seconds"] / result["continuous"]["seconds"]
    for way in ("static", "padded"):
        print(f"continuous is {result[f'ratio_to_{way}']:.2f} times as fast as {way}")
    if llama is not None:
        speed = llama_speed(llama, path, load)
        result["llama_tokens_per_second"] = speed
        ratio = result["continuous"]["tokens_per_second"] / speed
        print(
            f"llama.cpp  {speed:7.0f} tok/s at the mean lengths; ours is {ratio:.2f} times as fast"
        )
    return result


def llama_speed(program: Path, path: Path, load: Load) -> float:
    """The better of flash attention on and off."""
    prompt, output = (round(statistics.mean(x)) for x in (map(len, load.prompts), load.outputs))
    best = 0.0
    for flash in ("on", "off"):
        command = [
            str(program),
            "-m",
            str(path),
            "-t",
            "2",
            "-tb",
            "2",
            "-fa",
            flash,
            "-npp",
            str(prompt),
            "-ntg",
            str(output),
        ]
        command += [
            "-npl",
            str(NUM_SEQS),
            "-c",
            str(NUM_SEQS * (prompt + output + 8)),
            "-b",
            "2048",
            "-ub",
            "512",
            "--output-format",
            "jsonl",
        ]
        text = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=600
        ).stdout
        best = max([best, *(float(s) for s in re.findall(r'"speed":\s*([0-9.]+)', text))])
    return best


def prefix(path: Path, load: Load) -> dict[str, Any]:
    runs = {
        name: run(path, load, enable_prefix_caching=on)
        for name, on in (("without", False), ("with", True))
    }
    for name, r in runs.items():
        print(
            f"{name:8} the radix tree: {r.seconds:7.1f} s, median TTFT {r.ttft:7.2f} s, "
            f"{r.cached_share:6.1%} of the prompts' tokens hit"
        )
    ttft, total = (
        getattr(runs["without"], x) / getattr(runs["with"], x) for x in ("ttft", "seconds")
    )
    same = runs["with"].token_ids == runs["without"].token_ids
    print(
        f"TTFT {ttft:.1f} times lower, total {total:.1f} times lower, tokens "
        f"{'identical' if same else 'DIFFERENT'}"
    )
    return {
        "ttft_ratio": ttft,
        "total_ratio": total,
        "hit_rate": runs["with"].cached_share,
        "identical": same,
    }


def preemption(path: Path, load: Load) -> dict[str, Any]:
    whole = run(path, load)
    blocks = sorted(
        (-(-(len(p) + n) // 16) for p, n in zip(load.prompts, load.outputs, strict=True)),
        reverse=True,
    )
    with open_model(path) as model:
        layout = model.layout(EngineConfig())
    memory = (
        max(sum(blocks[:NUM_SEQS]) // 4, blocks[0] + 1)
        * len(layout.groups)
        * layout.bytes_per_block
    )
    result: dict[str, Any] = {"whole_seconds": whole.seconds}
    print(
        f"enough memory: {whole.seconds:6.1f} s; now {memory / 2**20:.0f} MiB, a quarter of what "
        f"{NUM_SEQS} of these requests hold"
    )
    for way in ("recompute", "swap"):
        r = run(path, load, preemption=way, kv_cache_memory=memory)
        same = r.token_ids == whole.token_ids
        cost = (r.seconds - whole.seconds) / max(1, r.num_preemptions)
        result[way] = {"seconds": r.seconds, "preemptions": r.num_preemptions, "identical": same}
        print(
            f"{way:10} {r.seconds:7.1f} s, {r.num_preemptions} preemptions, {cost * 1e3:6.0f} ms "
            "more for each, "
            f"tokens {'identical' if same else 'DIFFERENT'}"
        )
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--only", nargs="*", default=["overhead", "batching", "prefix", "preemption"]
    )
    parser.add_argument("--requests", type=int, help="of each load, instead of its own number")
    parser.add_argument("--llama-batched-bench", type=Path)
    args = parser.parse_args()
    vocab = LLM(args.model, max_model_len=64).model_config.vocab_size
    mixed, shared = (
        mixed_load(vocab, args.requests or MIXED),
        shared_load(vocab, args.requests or SHARED),
    )
    parts = {
        "overhead": lambda: overhead(args.model, vocab),
        "batching": lambda: batching(args.model, mixed, vocab, args.llama_batched_bench),
        "prefix": lambda: prefix(args.model, shared),
        "preemption": lambda: preemption(args.model, mixed),
    }
    result = {}
    for name in args.only:
        print(f"\n{name}")
        result[name] = parts[name]()
    print(json.dumps({"model": args.model.name, **result}))


if __name__ == "__main__":
    main()
