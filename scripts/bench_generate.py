"""Prefill and decode of one sequence through the whole engine, tokens per second; beside llama.cpp
if its llama-bench is given.

    scripts/bench generate -m smollm2-135m-instruct [--prompt 512] [--output 64] [--runs 5]
    [--backend reference] [--llama-bench PATH]

Runs alternate (ours, llama.cpp, ours, …), so that both see the same state of the machine, and
medians are shown. The last line is JSON. Prefill is prompt tokens over the time to the first token,
decode the tokens after the first over the rest: scheduling, sampling and detokenization are in
both.
"""

import argparse
import json
import statistics
import subprocess

from pellucid import LLM, SamplingParams
from pellucid.outputs import RequestOutput


def ours(llm: LLM, prompt: list[int], output: int) -> tuple[float, float]:
    """(prefill, decode) tokens per second of one run."""
    params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
    done: RequestOutput = llm.generate([prompt], params, use_tqdm=False)[0]
    metrics = done.metrics
    arrival, first, end = metrics.arrival_time, metrics.first_token_time, metrics.finished_time
    assert first is not None and end is not None
    return len(prompt) / (first - arrival), (output - 1) / (end - first)


def llama_cpp(
    binary: str, model: str, prompt: int, output: int, threads: int
) -> tuple[float, float]:
    """The same of llama-bench, which measures without sampling and text."""
    command = [
        binary,
        "-m",
        model,
        "-p",
        str(prompt),
        "-n",
        str(output),
        "-t",
        str(threads),
        "-r",
        "1",
        "-o",
        "json",
    ]
    runs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return next(r["avg_ts"] for r in runs if r["n_prompt"]), next(
        r["avg_ts"] for r in runs if r["n_gen"]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-m", "--model", default="smollm2-135m-instruct")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of llama-bench")
    parser.add_argument("--backend", default="native")
    parser.add_argument("--llama-bench", metavar="PATH")
    args = parser.parse_args()

    llm = LLM(
        args.model, backend=args.backend, max_model_len=args.prompt + args.output, progress=True
    )
    vocab = llm.model_config.vocab_size
    prompt = [(7919 * i + 13) % vocab for i in range(args.prompt)]
    ours(llm, prompt, 2)  # the first run pays for memory that is touched for the first time
    results: dict[str, list[tuple[float, float]]] = {"pellucid": []}
    for _ in range(args.runs):
        results["pellucid"].append(ours(llm, prompt, args.output))
        if args.llama_bench:
            theirs = llama_cpp(
                args.llama_bench, str(llm.path), args.prompt, args.output, args.threads
            )
            results.setdefault("llama.cpp", []).append(theirs)

    report: dict[str, object] = {
        "model": str(llm.path),
        "prompt": args.prompt,
        "output": args.output,
        "runs": args.runs,
    }
    print(
        f"{'engine':<12} {'prefill ' + str(args.prompt):>16} {'decode ' + str(args.output):>16}   "
        "tokens/s, median (min – max)"
    )
    for engine, runs in results.items():
        columns = []
        for i, name in enumerate(("prefill", "decode")):
            values = [run[i] for run in runs]
            columns.append(
                f"{statistics.median(values):.1f} ({min(values):.1f} – {max(values):.1f})"
            )
            report[f"{engine}_{name}"] = statistics.median(values)
        print(f"{engine:<12} {columns[0]:>24} {columns[1]:>24}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
