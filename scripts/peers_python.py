"""The peers that are Python packages, on the shapes of bench_peers: run by it, in an environment
that holds the peer and not Pellucid.

    PYTHON scripts/peers_python.py vllm FOLDER THREADS  (config.json alone: random bfloat16 weights)
    PYTHON scripts/peers_python.py openvino FILE.gguf THREADS

Prompts are token ids. Prefill: a prompt of 512 and one token. Decode of n sequences: the time of n
prompts of 64 with 1 + 32 tokens each, less the time of the same with 1 each. Every figure is the
median of three, after one run that is thrown away; no run shares a prefix with another. The last
line is JSON: tokens per second by shape.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

PREFILL, PROMPT, OUTPUT, SEQUENCES, RUNS = 512, 64, 32, (1, 8, 32), 3
Generate = Callable[[list[list[int]], int], Any]  # prompts, and how many tokens to answer each with


def vllm(folder: str, threads: int) -> Generate:
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        load_format="dummy",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=1024,
        enable_prefix_caching=False,
    )

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        params = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        return engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )

    return generate


def openvino(path: str, threads: int) -> Generate:
    import numpy as np
    import openvino_genai
    from openvino import Tensor

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching, scheduler.cache_size = False, 1  # GB
    engine = openvino_genai.LLMPipeline(
        path, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
    )

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        ids = np.array(prompts, np.int64)
        inputs = openvino_genai.TokenizedInputs(Tensor(ids), Tensor(np.ones_like(ids)))
        return engine.generate(inputs, max_new_tokens=tokens, ignore_eos=True, do_sample=False)

    return generate


def main() -> None:
    peer, path, threads = sys.argv[1:]
    generate = {"vllm": vllm, "openvino": openvino}[peer](path, int(threads))
    drawn = 0

    def seconds(requests: int, length: int, tokens: int) -> float:
        nonlocal drawn
        drawn += 1
        prompts = [
            [(p * 7919 + r * 104729 + drawn * 1299709) % 32000 + 100 for p in range(length)]
            for r in range(requests)
        ]
        start = time.perf_counter()
        generate(prompts, tokens)
        return time.perf_counter() - start

    found = {}
    seconds(1, PREFILL, 1)
    found[f"prefill {PREFILL}"] = PREFILL / statistics.median(
        seconds(1, PREFILL, 1) for _ in range(RUNS)
    )
    for n in SEQUENCES:
        seconds(n, PROMPT, 1 + OUTPUT)
        spent = statistics.median(
            seconds(n, PROMPT, 1 + OUTPUT) - seconds(n, PROMPT, 1) for _ in range(RUNS)
        )
        found[f"decode, {n} sequence" + "s" * (n > 1)] = n * OUTPUT / spent
    print(json.dumps(found))


if __name__ == "__main__":
    main()
