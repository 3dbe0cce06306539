"""Runs another engine that is a Python package, in a process of its own and in that package's
environment, which need not hold Pellucid: this file imports nothing of it.

    PYTHON bench_worker.py ENGINE

One JSON object per line comes on standard input, and one answer goes to standard output:

    {"open": {"path": …, "threads": 2, "batch": 2048, "ubatch": 512, "longest": 640,
              "sequences": 1, "vocab_size": 49152}}                -> {"facts": {…}}
    {"test": {"prompt": 512, "output": 0, "depth": 0}}             -> {"seconds": [0.31]}
    {"batch": {"prompt": 64, "output": 32, "sequences": 8}}        -> {"seconds": [0.30, 0.21]}
    {"requests": {"prompts": [[1, 5, 9]], "outputs": [16]}}        -> {"seconds": [0.52]}

An answer is {"error": "…"} where that failed. What the engine itself prints goes to standard error.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

__all__ = ["ENGINES", "main"]


class _Engine(Protocol):
    def facts(self) -> dict[str, Any]: ...

    def test(self, prompt: int, output: int, depth: int) -> list[float]: ...

    def batch(self, prompt: int, output: int, sequences: int) -> list[float]: ...

    def requests(self, prompts: list[list[int]], outputs: list[int]) -> list[float]: ...


def _token_ids(vocab_size: int, sequence: int, start: int, tokens: int, salt: int = 0) -> list[int]:
    """Another salt shares no prefix."""
    return [
        (position * 7919 + sequence * 104729 + salt * 1299709 + 13) % vocab_size
        for position in range(start, start + tokens)
    ]


class _Transformers:
    """Hugging Face Transformers on PyTorch, step by step as ours: logits, and no token chosen."""

    def __init__(self, path: str, threads: int, vocab_size: int, **_: Any) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        logging: Any = transformers.utils.logging
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder, of_gguf = path, {}
        if path.endswith(".gguf"):
            folder, of_gguf = str(Path(path).parent), {"gguf_file": Path(path).name}
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, dtype="auto", **of_gguf
        )
        self._torch, self._transformers, self._model = torch, transformers, model.eval()
        self._vocab_size = vocab_size

    def facts(self) -> dict[str, Any]:
        dtype = str(self._model.dtype).removeprefix("torch.")
        return {
            "version": f"{self._transformers.__version__} on PyTorch {self._torch.__version__}",
            "build": f"weights in {dtype}, {self._torch.get_num_threads()} threads",
            "backends": [f"PyTorch {self._torch.backends.cpu.get_cpu_capability()}"],
        }

    def test(self, prompt: int, output: int, depth: int) -> list[float]:
        return [sum(self._run(1, depth, prompt, output))]

    def batch(self, prompt: int, output: int, sequences: int) -> list[float]:
        return self._run(sequences, 0, prompt, output)

    def requests(self, prompts: list[list[int]], outputs: list[int]) -> list[float]:
        raise ValueError("Transformers batches no requests by itself")

    def _run(self, sequences: int, depth: int, prompt: int, output: int) -> list[float]:
        cache = self._transformers.DynamicCache(config=self._model.config)

        def step(start: int, tokens: int) -> None:
            ids = [_token_ids(self._vocab_size, s, start, tokens) for s in range(sequences)]
            self._model(
                input_ids=self._torch.tensor(ids),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )

        with self._torch.inference_mode():
            if depth:
                step(0, depth)
            times = [time.perf_counter()]
            if prompt:
                step(depth, prompt)
            times.append(time.perf_counter())
            for position in range(depth + prompt, depth + prompt + output):
                step(position, 1)
            times.append(time.perf_counter())
        return [times[1] - times[0], times[2] - times[1]]


class _LlamaCpp:
    """llama-cpp-python, through its `Llama.eval`: one sequence."""

    def __init__(
        self,
        path: str,
        threads: int,
        batch: int,
        ubatch: int,
        longest: int,
        vocab_size: int,
        **_: Any,
    ) -> None:
        import llama_cpp

        self._library, self._vocab_size = llama_cpp, vocab_size
        self._llama = llama_cpp.Llama(
            path,
            n_ctx=longest,
            n_threads=threads,
            n_threads_batch=threads,
            n_batch=batch,
            n_ubatch=ubatch,
            flash_attn=True,
            verbose=False,
        )

    def facts(self) -> dict[str, Any]:
        info = self._library.llama_print_system_info().decode()
        parts = [part.strip() for part in info.replace(":", "|").split("|")]
        flags = [part.removesuffix("= 1").strip() for part in parts if part.endswith("= 1")]
        return {
            "version": f"llama-cpp-python {self._library.__version__}",
            "build": " ".join(flags),
            "backends": _mapped("libggml-"),
        }

    def test(self, prompt: int, output: int, depth: int) -> list[float]:
        self._llama.reset()
        if depth:
            self._llama.eval(_token_ids(self._vocab_size, 0, 0, depth))
        start = time.perf_counter()
        if prompt:
            self._llama.eval(_token_ids(self._vocab_size, 0, depth, prompt))
        for position in range(depth + prompt, depth + prompt + output):
            self._llama.eval(_token_ids(self._vocab_size, 0, position, 1))
        return [time.perf_counter() - start]

    def batch(self, prompt: int, output: int, sequences: int) -> list[float]:
        raise ValueError("llama-cpp-python runs one sequence; llama-batched-bench is needed")

    def requests(self, prompts: list[list[int]], outputs: list[int]) -> list[float]:
        raise ValueError("llama-cpp-python runs one sequence")


class _Generating:
    """An engine that only generates whole answers. Decoding is the time of answers of 1 + n tokens
    less that of answers of one; computing behind a context, the time of both less the context's.
    Prompts share no prefix with those before.
    """

    _drawn = 0
    _vocab_size: int

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> None:
        raise NotImplementedError

    def test(self, prompt: int, output: int, depth: int) -> list[float]:
        if not output:
            before = self._seconds(1, depth, 1) if depth else 0.0
            return [self._seconds(1, depth + prompt, 1) - before]
        if not prompt:
            length = max(depth, 1)
            return [self._seconds(1, length, 1 + output) - self._seconds(1, length, 1)]
        before = self._seconds(1, depth, 1) if depth else 0.0
        return [self._seconds(1, depth + prompt, output) - before]

    def batch(self, prompt: int, output: int, sequences: int) -> list[float]:
        prefill = self._seconds(sequences, prompt, 1)
        return [prefill, self._seconds(sequences, prompt, 1 + output) - prefill]

    def _seconds(self, sequences: int, length: int, tokens: int) -> float:
        self._drawn += 1
        prompts = [
            _token_ids(self._vocab_size, s, 0, length, self._drawn) for s in range(sequences)
        ]
        (seconds,) = self.requests(prompts, [tokens] * sequences)
        return seconds

    def requests(self, prompts: list[list[int]], outputs: list[int]) -> list[float]:
        start = time.perf_counter()
        self.generate(prompts, outputs)
        return [time.perf_counter() - start]


class _VLLM(_Generating):
    """vLLM. A folder that holds config.json alone runs with random weights."""

    def __init__(
        self, path: str, threads: int, longest: int, sequences: int, vocab_size: int, **_: Any
    ) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        import vllm

        self._is_random = not any(Path(path).glob("*.safetensors"))
        self._library, self._vocab_size = vllm, vocab_size
        self._engine = vllm.LLM(
            path,
            load_format="dummy" if self._is_random else "auto",
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=longest + 1,
            max_num_seqs=max(sequences, 1),
            enable_prefix_caching=False,
        )

    def facts(self) -> dict[str, Any]:
        weights = "random weights of the model's shape" if self._is_random else "weights"
        return {
            "version": self._library.__version__,
            "build": f"{weights} in bfloat16; tokens are chosen too",
            "backends": [str(self._library.platforms.current_platform.device_name)],
        }

    def generate(self, prompts: list[list[int]], outputs: list[int]) -> None:
        params = [
            self._library.SamplingParams(
                temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
            )
            for tokens in outputs
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        self._engine.generate(inputs, params, use_tqdm=False)


ENGINES = {"transformers": _Transformers, "llama-cpp-python": _LlamaCpp, "vllm": _VLLM}
MODULES = {"transformers": "transformers", "llama-cpp-python": "llama_cpp", "vllm": "vllm"}


def _mapped(part: str) -> list[str]:
    """Names of the libraries that this process has mapped; Linux only."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    names = {Path(line.split()[-1]).name for line in lines if part in line}
    return sorted(name for name in names if not name.startswith("libggml-base"))


def _answer(engine: _Engine | None, name: str, message: dict[str, Any]) -> tuple[Any, Any]:
    """(the engine from now on, the answer)."""
    ((verb, values),) = message.items()
    if verb == "open":
        opened: Any = ENGINES[name](**values)
        return opened, {"facts": opened.facts()}
    assert engine is not None
    verbs: dict[str, Callable[..., list[float]]] = {
        "test": engine.test,
        "batch": engine.batch,
        "requests": engine.requests,
    }
    return engine, {"seconds": verbs[verb](**values)}


def main(arguments: Sequence[str]) -> None:
    """Answer until standard input ends."""
    (name,) = arguments
    # Python looks for modules beside a script first, where `profile` and others are not the ones
    # that a library means.
    here = Path(__file__).resolve().parent
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != here]
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints
    engine: Any = None
    for line in sys.stdin:
        try:
            engine, answer = _answer(engine, name, json.loads(line))
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            answer = {"error": " ".join(text.split())[:300]}
            if isinstance(error, ModuleNotFoundError) and error.name == MODULES[name]:
                answer["missing"] = MODULES[name]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
