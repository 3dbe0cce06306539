"""Offline throughput through the whole engine, as `vllm bench throughput` measures it: many
requests that are all there at once, until the last has its last token.

The engine batches them as it likes, chooses tokens greedily and makes text. Prompts are random
token ids that share no prefix, or the lines of a file; end-of-sequence tokens are ignored, so the
work does not depend on what the model says.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.llm import LLM
from ..errors import ConfigError
from ..sampling_params import SamplingParams
from ..tokenizer import load_tokenizer
from ..weights.checkpoint import open_checkpoint
from .load_workload import COMPLETIONS, file_workload

__all__ = ["OfflineEngine", "OfflineLoad", "file_load", "random_load"]


@dataclass(frozen=True, slots=True)
class OfflineLoad:
    """Requests: the token ids of each prompt, and how many tokens to answer with."""

    prompts: Sequence[list[int]]
    outputs: Sequence[int]

    @property
    def input_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def output_tokens(self) -> int:
        return sum(self.outputs)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(len(p) + n for p, n in zip(self.prompts, self.outputs, strict=True))


def random_load(count: int, input_len: int, output_len: int, vocab_size: int) -> OfflineLoad:
    """`count` requests of equal lengths; the same ones each time."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, vocab_size, (count, input_len))
    return OfflineLoad(ids.tolist(), [output_len] * count)


def file_load(file: Path, count: int, output_len: int, model: Path) -> OfflineLoad:
    """Prompts of a file, as tokens of the model: its first `count` lines (`load_workload`), again
    from the first after the last. `output_len`: of lines that name none.
    """
    workload = file_workload(COMPLETIONS, file, output_len, count)
    found = [workload.request(i) for i in range(count)]
    with open_checkpoint(model) as checkpoint:
        tokenizer = load_tokenizer(checkpoint.tokenizer_source)
    prompts, outputs = [], []
    for request in found:
        text = request.body.get("prompt")
        if not isinstance(text, str) or request.output_length is None:
            raise ConfigError(f"{file}: throughput is measured on texts (prompt) alone")
        prompts.append(tokenizer.encode(text))
        outputs.append(request.output_length)
    return OfflineLoad(prompts, outputs)


class OfflineEngine:
    """The engine with room for requests of `longest` tokens, and no cache of prefixes, which would
    spare it the prompts from the second round on.
    """

    def __init__(self, path: Path, longest: int, options: Mapping[str, Any]) -> None:
        self._llm = LLM(
            path, max_model_len=longest, enable_prefix_caching=False, speculative=None, **options
        )

    def run(self, load: OfflineLoad) -> float:
        """Seconds until the last request has ended."""
        params = [
            SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in load.outputs
        ]
        start = time.perf_counter()
        self._llm.generate([list(ids) for ids in load.prompts], params, use_tqdm=False)
        return time.perf_counter() - start

    def close(self) -> None:
        self._llm.close()
