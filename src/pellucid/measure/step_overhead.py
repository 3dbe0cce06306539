"""How long a step takes outside the ops of its program: the schedule, the batch, the call and the
waking of threads, sampling, text. It is measured, because it depends on the machine.

The engine's own core decodes with the few layers of `kernel_times.py`. Before each step the caches
are left as the real model leaves them: Python finds nothing of its own there. The vocabulary is
cut, so what sampling takes for the whole one is timed apart and added.
"""

import statistics
import time

import numpy as np

from ..backends.host_logits import HostLogits
from ..backends.native.backend import NativeBackend
from ..engine.loader import build_core
from ..engine_config import EngineConfig
from ..sampling import SamplingRow
from ..sampling_params import SamplingParams
from ..tokenizer.numbered import numbered_tokenizer
from .kernel_times import FewLayers
from .profile import run_prompts
from .roofline import BLOCK_SIZE

__all__ = ["measure_step_overhead"]

PROMPT, STEPS = 32, 24  # tokens
MOST_REQUESTS = 64  # that are run: above, the time grows with their number
TRIES = 5


def measure_step_overhead(few: FewLayers, backend: NativeBackend, requests: int) -> float:
    """Median seconds of a step of decoding beside its ops. `requests` decode in it."""
    run = min(requests, MOST_REQUESTS)
    layout = few.program.layout
    # An engine for these requests.
    vocab_size = few.program.config.vocab_size
    core = build_core(
        few.program.config,
        numbered_tokenizer(vocab_size),
        EngineConfig(
            block_size=BLOCK_SIZE,
            preemption="recompute",
            enable_prefix_caching=False,
            speculative=None,
        ),
        backend,
        few.weights,
        layout,
        explain=None,
        max_num_seqs=run,
        max_model_len=PROMPT + STEPS,
        num_blocks=run * layout.blocks_for(PROMPT + STEPS, EngineConfig().max_num_batched_tokens),
    )
    # Time its steps; the first few touch memory and code for the first time.
    _, steps = run_prompts(core, vocab_size, PROMPT, STEPS, run, before_step=few.sweep)
    outside = statistics.median(
        step.end - step.start - float(step.timed.seconds.sum()) for step in steps[STEPS // 4 :]
    )
    return (
        outside * requests / run
        + _sampling_seconds(requests, few.whole.config.vocab_size)
        - _sampling_seconds(run, vocab_size) * requests / run
    )


def _sampling_seconds(rows: int, vocab_size: int) -> float:
    """To take the likeliest token of each row."""
    count = min(rows, MOST_REQUESTS)
    logits = HostLogits(np.zeros((count, vocab_size), np.float32))
    greedy = SamplingRow(params=SamplingParams(temperature=0), seed=0, position=PROMPT)
    times = []
    for _ in range(TRIES):
        start = time.perf_counter()
        logits.sample(range(count), [greedy] * count)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * rows / count
