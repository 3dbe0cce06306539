"""scripts/bench scheduler: the scheduler's time for one decode step, in µs of `schedule` and of
`update`. No model is run.

Every request has computed its prompt and draws one token per step. Blocks hold 16 tokens, and the
prompts' lengths differ, so that each step brings one request in 16 to the end of a block, where it
needs a new one and publishes the old. Mean: of 64 steps, four blocks of each request. One JSON line
at the end.
"""

import json
import statistics
import time
from dataclasses import dataclass

from pellucid.kv.layout import build_layout
from pellucid.kv.manager import KVCacheManager
from pellucid.kv_spec import KVSpec
from pellucid.request import Request
from pellucid.sampling_params import SamplingParams
from pellucid.scheduler import Scheduler

PROMPT, STEPS, BLOCK = 32, 64, 16
# tokens: more than are drawn until the last prompt is computed and STEPS are measured
OUTPUT = 2 * STEPS + BLOCK


@dataclass(frozen=True)
class Cost:
    """Microseconds of the measured steps."""

    schedule: float  # median
    update: float  # median
    step: float  # median
    mean: float
    longest: float


def measure(running: int, enable_prefix_caching: bool) -> Cost:
    """The cost with so many requests that decode."""
    layout = build_layout([KVSpec(1, 64, 64, "f16", "f16")], [256], BLOCK)
    kv = KVCacheManager(layout, 20 * running, enable_prefix_caching=enable_prefix_caching)
    scheduler = Scheduler(kv, max_model_len=300, max_num_batched_tokens=512, max_num_seqs=running)
    params = SamplingParams(max_tokens=OUTPUT, ignore_eos=True)
    for i in range(running):
        tokens = [i, *range(1, PROMPT + i % BLOCK)]
        scheduler.add(
            Request(
                request_id=str(i), prompt_token_ids=tokens, params=params, seed=0, max_tokens=OUTPUT
            )
        )
    plans: list[float] = []
    books: list[float] = []
    while len(plans) < STEPS:
        start = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        sampled = {r.request_id: [1] for r in step.requests if r.is_sampling}
        ran = time.perf_counter()
        scheduler.update(step, sampled)
        if len(step.requests) == running and all(
            r.num_scheduled_tokens == 1 for r in step.requests
        ):
            plans.append((planned - start) * 1e6)
            books.append((time.perf_counter() - ran) * 1e6)
    steps = [plan + book for plan, book in zip(plans, books, strict=True)]
    median = statistics.median
    return Cost(median(plans), median(books), median(steps), statistics.mean(steps), max(steps))


def main() -> None:
    found = []
    print(
        f"{'running':>8}{'prefix cache':>14}{'schedule, µs':>14}{'update, µs':>12}"
        f"{'step, µs':>10}{'mean':>8}{'longest':>9}"
    )
    for running in (1, 8, 64, 256):
        for caching in (True, False):
            cost = measure(running, caching)
            found.append(
                {
                    "running": running,
                    "prefix_caching": caching,
                    "step_us": round(cost.step, 1),
                    "mean_us": round(cost.mean, 1),
                }
            )
            columns = (
                f"{cost.schedule:>14.1f}{cost.update:>12.1f}{cost.step:>10.1f}{cost.mean:>8.1f}"
                f"{cost.longest:>9.1f}"
            )
            print(f"{running:>8}{'on' if caching else 'off':>14}{columns}")
    print(json.dumps({"benchmark": "scheduler", "found": found}))


if __name__ == "__main__":
    main()
