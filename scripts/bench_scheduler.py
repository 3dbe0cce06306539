"""scripts/bench scheduler: what one decode step costs the scheduler, in µs of `schedule` and of `update`. No model is run.

Every request has its prompt behind it and draws one token per step; blocks hold 16 tokens. Medians; one JSON line at the end.
"""

import json
import statistics
import time

from pellucid.kv.layout import KVLayout, LayerGroup
from pellucid.kv.manager import KVCacheManager
from pellucid.request import Request, SamplingParams
from pellucid.scheduler import Scheduler

PROMPT, STEPS = 32, 60


def measure(running: int) -> tuple[float, float]:
    """Seconds of `schedule` and of `update` with so many requests that decode."""
    layout = KVLayout((LayerGroup((0,), None),), num_kv_heads=1, head_dim=64, block_size=16, token_bytes=256)
    kv = KVCacheManager(layout, 20 * running)
    scheduler = Scheduler(kv, max_model_len=300, max_num_batched_tokens=512, max_num_seqs=running)
    params = SamplingParams(max_tokens=200, ignore_eos=True)
    for i in range(running):
        tokens = [i, *range(1, PROMPT)]
        scheduler.add(Request(request_id=str(i), prompt_token_ids=tokens, params=params, seed=0, max_tokens=200))
    times: list[tuple[float, float]] = []
    while len(times) < STEPS:
        start = time.perf_counter()
        step = scheduler.schedule()
        planned = time.perf_counter()
        sampled = {s.request.request_id: 1 for s in step.requests if s.samples}
        ran = time.perf_counter()
        scheduler.update(step, sampled)
        if len(step.requests) == running and all(s.num_scheduled_tokens == 1 for s in step.requests):
            times.append((planned - start, time.perf_counter() - ran))
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def main() -> None:
    found = {running: measure(running) for running in (1, 8, 64, 256)}
    print(f"{'running':>8}{'schedule, µs':>14}{'update, µs':>12}{'step, µs':>10}")
    for running, (plan, book) in found.items():
        print(f"{running:>8}{plan * 1e6:>14.1f}{book * 1e6:>12.1f}{(plan + book) * 1e6:>10.1f}")
    print(json.dumps({"benchmark": "scheduler", "step_us": {running: round(sum(t) * 1e6, 1) for running, t in found.items()}}))


if __name__ == "__main__":
    main()
