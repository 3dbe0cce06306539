"""Peers that are Python packages: `bench_worker.py` runs them in a process of their own, with the
interpreter that has them. The process lives while models are measured, and sleeps between rounds.

vLLM runs no GGUF on a CPU. Of a .gguf file it gets a model of the same shape with random weights in
bfloat16, which its facts say.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

from ..config import ModelConfig
from ..errors import ConfigError, PellucidError
from ..weights.checkpoint import open_checkpoint
from .bench_peers import LlamaCpp, Peer, PeerFacts, Setup, find_program
from .bench_start import ColdStart, PeakMeter
from .bench_tests import Test

__all__ = ["PythonPeer", "open_peer", "vllm_config"]

WORKER = Path(__file__).with_name("bench_worker.py")
PACKAGES = {"llama.cpp": "llama-cpp-python", "vllm": "vllm", "transformers": "transformers"}
# architecture -> the name of its class
VLLM_NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def open_peer(name: str, *, llama_cpp: str | None = None, python: str | None = None) -> Peer:
    """The peer of this name. llama.cpp is measured by its programs where they are found, and
    otherwise by llama-cpp-python. Raises ConfigError where it is not installed.
    """
    if python is not None and shutil.which(python) is None:
        raise ConfigError(f"--peer-python is {python!r}; there is no such program")
    if name != "llama.cpp":
        return PythonPeer(name, python)
    if llama_cpp is not None:
        find_program("llama-bench", llama_cpp)
        return LlamaCpp(llama_cpp)
    if python is None and shutil.which("llama-bench") is not None:
        return LlamaCpp()
    return PythonPeer(name, python)


class PythonPeer:
    """A package, in a process that answers line by line."""

    def __init__(self, name: str, python: str | None = None) -> None:
        """`python`: the interpreter that has the package; None: this one."""
        self.name = name
        self.variants: tuple[str, ...] = ("",)
        self._python = python or sys.executable
        self._package = PACKAGES[name]
        self._process: subprocess.Popen[str] | None = None
        self._log: deque[str] = deque(maxlen=20)  # the last lines that it wrote to standard error
        self._folder = tempfile.TemporaryDirectory(prefix="pellucid-bench-")
        self._facts: PeerFacts | None = None
        self._opened: dict[str, Any] = {}

    def open(self, path: Path, setup: Setup) -> None:
        """Start a process, and load the model in it."""
        if self.name == "llama.cpp" and path.suffix != ".gguf":
            raise ConfigError(f"{path} is no .gguf file, and llama.cpp reads no other")
        if self.name == "vllm" and path.suffix == ".gguf":
            with open_checkpoint(path) as checkpoint:
                values = vllm_config(checkpoint.config)
            path = Path(self._folder.name, path.stem)
            path.mkdir(exist_ok=True)
            (path / "config.json").write_text(json.dumps(values))
        self._opened = {"path": str(path.absolute()), **asdict(setup)}
        self._load()

    def _load(self) -> None:
        self._stop()
        self._start()
        facts = self._ask("open", **self._opened)["facts"]
        self._facts = PeerFacts(
            self.name, str(facts["version"]), str(facts["build"]), tuple(facts["backends"])
        )

    def facts(self) -> PeerFacts:
        assert self._facts is not None
        return self._facts

    def run_test(self, test: Test, variant: str) -> float:
        (seconds,) = self._ask("test", prompt=test.prompt, output=test.output, depth=test.depth)[
            "seconds"
        ]
        return float(seconds)

    def run_batch(
        self, prompt: int, output: int, sequences: int, variant: str
    ) -> tuple[float, float]:
        found = self._ask("batch", prompt=prompt, output=output, sequences=sequences)["seconds"]
        return float(found[0]), float(found[1])

    def run_requests(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> float:
        (seconds,) = self._ask("requests", prompts=list(prompts), outputs=list(outputs))["seconds"]
        return float(seconds)

    def run_cold(self) -> ColdStart:
        start = time.perf_counter()
        self._load()
        assert self._process is not None
        meter = PeakMeter(self._process.pid)
        self._ask("test", prompt=1, output=0, depth=0)
        end = time.perf_counter() - start
        return ColdStart(end, end, meter.stop())

    def close(self) -> None:
        self._stop()
        self._folder.cleanup()

    def _start(self) -> None:
        try:
            self._process = subprocess.Popen(
                [self._python, str(WORKER), self._package],
                cwd=self._folder.name,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
        except OSError as error:
            raise ConfigError(f"{self._python} cannot be run: {error.strerror}") from None
        Thread(target=self._keep_log, args=(self._process,), daemon=True).start()

    def _keep_log(self, process: "subprocess.Popen[str]") -> None:
        assert process.stderr is not None
        self._log.extend(process.stderr)

    def _ask(self, verb: str, **values: Any) -> Mapping[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({verb: values}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline(1 << 16)
        except BrokenPipeError:
            line = ""
        if not line:
            code = process.wait()
            last = " ".join(" ".join(self._log).split())[-300:]
            raise PellucidError(f"{self.name} ended with {code}: {last}")
        answer = json.loads(line)
        if "missing" in answer:
            if self.name == "llama.cpp":
                raise ConfigError(
                    "llama.cpp is not installed: llama-bench is not on PATH (--llama-cpp names its "
                    f"folder), and {self._python} has no llama-cpp-python (--peer-python names "
                    "another interpreter)"
                )
            raise ConfigError(
                f"{self.name} is not installed: {self._python} cannot import it; --peer-python "
                "names another interpreter"
            )
        if "error" in answer:
            raise PellucidError(f"{self.name} cannot run this: {answer['error']}")
        return dict(answer)

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with process:
            pass


def vllm_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model of the same shape."""
    if config.rope is None or config.architecture not in VLLM_NAMES:
        raise ConfigError(
            f"architecture is {config.architecture!r}; of a .gguf file vLLM is measured on one of "
            f"{', '.join(sorted(VLLM_NAMES))}"
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
