"""`pellucid verify`: checks on this model and machine that batching, caching and threads change no
answer.
"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from .options import debug_option, json_option
from .terminal import print_table

if TYPE_CHECKING:
    from ..measure.verify import Outcome

__all__ = ["verify"]


@click.command()
@click.argument("model")
@click.option(
    "--isa",
    metavar="NAME",
    help="Kernels to run: avx512, avx2, neon, portable.  [default: the best that this CPU has]",
)
@json_option
@debug_option
def verify(model: str, isa: str | None, as_json: bool) -> None:
    """Run a few requests on MODEL in every way that the engine has, and compare their tokens and
    logprobs bit for bit.

    They are run alone and together, in chunks, on one thread and on two, with and without the
    prefix cache, and preempted, with keys and values in each dtype. Each must give the bits of a
    plain run alone in the same dtype. The exit status is 1 if one does not. The backend is the
    native one.
    """
    from ..engine.loader import open_model
    from ..measure.verify import PLAIN, Verification
    from ..weights.hub import resolve_model

    path = resolve_model(model, cache_dir=None, progress=True)
    outcomes = []
    with open_model(path) as opened:
        verification = Verification(opened, isa)
        total = len(verification.settings)
        _show(0, total, PLAIN.name)
        for i, outcome in enumerate(verification.run(), 1):
            _show(i, total, outcome.setting.name)
            outcomes.append(outcome)
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    is_exact = all(outcome.is_proven for outcome in outcomes)
    if as_json:
        rows = [{**asdict(outcome), "proven": outcome.is_proven} for outcome in outcomes]
        click.echo(json.dumps({"model": str(path), "exact": is_exact, "settings": rows}))
    else:
        header = [
            "setting",
            "requests",
            "tokens",
            "preemptions",
            "cached",
            "loaded",
            "drafted",
            "accepted",
            "seconds",
            "result",
        ]
        print_table(header, [_row(outcome) for outcome in outcomes])
        seconds = sum(verification.plain_seconds.values())
        failed = sum(not outcome.is_proven for outcome in outcomes)
        verdict = (
            "all gave the same bits"
            if is_exact
            else f"{failed} did not give the same bits, or did not show it"
        )
        click.echo(
            f"\nEach beside: {PLAIN.name}, KV in the same dtype ({seconds:.1f} s in all). Of "
            f"{len(outcomes)} settings {verdict}."
        )
        click.echo(
            "Not every combination: each factor is varied alone, and a few are combined at their "
            "worst."
        )
    if not is_exact:
        raise click.exceptions.Exit(1)


def _show(done: int, total: int, name: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{done} of {total}: {name}", err=True, nl=False)


def _row(outcome: "Outcome") -> list[str]:
    counts = (
        outcome.num_requests,
        outcome.num_tokens,
        outcome.num_preemptions,
        outcome.num_cached_tokens,
        outcome.num_loaded_blocks,
        outcome.num_draft_tokens,
        outcome.num_accepted_tokens,
    )
    result = outcome.difference or outcome.missing or "identical"
    return [outcome.setting.name, *map(str, counts), f"{outcome.seconds:.1f}", result]
