"""Whether the ledger of `pellucid profile` can be trusted: how much of the wall time it accounts
for, how near the fastest op comes to its ceiling, and what the ledger itself costs.

    scripts/bench ledger MODEL… [--rounds 3] [--steps 400]

"accounted" is the least share over the rounds. "nearest" is the largest share of its ceiling that
any op reached in any round: above 100 %, a ceiling was measured too low. "cost" compares steps of
decoding with the ledger on and off that take turns in one run: the median over pairs of neighbours
of on / off, less 1. The last line is JSON.
"""

import argparse
import json
import statistics
import time

from pellucid.backends.native.program import CapturedForward
from pellucid.engine.admission import Submission
from pellucid.engine.loader import load_engine
from pellucid.engine.options import build_engine_config
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.measure.profile import profile_model
from pellucid.sampling_params import SamplingParams
from pellucid.weights.hub import resolve_model


def ledger_cost(model: str, steps: int) -> float:
    """What the ledger adds to a step of decoding, as a share of it."""
    options: dict[str, object] = {
        "max_model_len": 64 + steps,
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
        "speculative": None,
    }
    core = load_engine(model, build_engine_config(options)).core
    forward = core.runner.forward
    assert isinstance(forward, CapturedForward)
    params = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True)
    core.add_requests([Submission("a", TokenizedPrompt(list(range(1, 33)), None), params)])
    core.step()
    seconds: list[float] = []
    while core.has_unfinished:
        forward.ledger = [] if len(seconds) % 2 else None
        start = time.perf_counter()
        core.step()
        seconds.append(time.perf_counter() - start)
    return (
        statistics.median(on / off for off, on in zip(seconds[::2], seconds[1::2], strict=False))
        - 1
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()

    rows: list[dict[str, object]] = []
    print(f"{'model':<34} {'phase':<8} {'accounted':>9} {'nearest':>8} {'of op':<12} {'cost':>7}")
    for model in args.models:
        path = resolve_model(model, progress=True)
        profiles = [
            profile_model(path, prompt=512, output=64, batch=1, options={})
            for _ in range(args.rounds)
        ]
        cost = ledger_cost(model, args.steps)
        for i, name in enumerate(("prefill", "decode")):
            phases = [found.phases[i] for found in profiles]
            accounted = min(1 - p.unaccounted_seconds / p.wall_seconds for p in phases)
            share, op = max((line.roof_share, line.name) for p in phases for line in p.ops)
            shown = f"{cost:+.1%}" if name == "decode" else ""
            print(f"{path.name:<34} {name:<8} {accounted:>9.1%} {share:>8.0%} {op:<12} {shown:>7}")
            rows.append(
                {"model": path.name, "phase": name, "accounted": accounted, "nearest": share}
                | {"op": op, "cost": cost if name == "decode" else None}
            )
    print(json.dumps({"rounds": args.rounds, "steps": args.steps, "rows": rows}))


if __name__ == "__main__":
    main()
