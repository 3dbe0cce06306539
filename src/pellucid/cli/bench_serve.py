"""`pellucid bench serve`: load on an OpenAI-compatible server, ours or a peer's."""

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, FormatError, RequestError
from ..files import parse_json
from .bench_serve_report import print_ratios, print_run, save_records
from .options import debug_option
from .terminal import say

if TYPE_CHECKING:
    from ..measure.load_rounds import LoadPlan

__all__ = ["serve"]

DEFAULT_PROMPTS = 100
DEFAULT_ROUNDS = 5


class _Rate(click.ParamType):  # type: ignore[type-arg]
    """Requests per second; inf: all at once."""

    name = "R"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            rate = float(value)
        except ValueError:
            rate = 0.0
        if not rate > 0:
            self.fail(f"{value!r} is no rate: give requests per second above 0, or inf", param, ctx)
        return rate


@click.command("serve")
@click.option("--url", required=True, help="The server, such as http://127.0.0.1:8000/v1.")
@click.option("--model", metavar="NAME", help="Ask for this model.  [default: the server's first]")
@click.option(
    "--endpoint",
    type=click.Choice(["completions", "chat"]),
    default="completions",
    show_default=True,
    help="Where requests go.",
)
@click.option(
    "--num-prompts",
    type=click.IntRange(min=1),
    help=f"Send so many requests.  [default: {DEFAULT_PROMPTS}; with --duration or --trace no "
    "limit]",
)
@click.option(
    "--duration",
    type=click.FloatRange(min=0, min_open=True),
    metavar="SECONDS",
    help="Send requests for so long, then wait for the answers that are under way.",
)
@click.option(
    "--request-rate",
    type=_Rate(),
    default="inf",
    show_default=True,
    help="Open loop: requests per second, by a Poisson process; inf: all at once. With --trace: "
    "its times are scaled to this mean rate.",
)
@click.option(
    "--burstiness",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Shape of the gamma distribution of intervals: 1 is Poisson, less is burstier.",
)
@click.option(
    "--max-concurrency",
    type=click.IntRange(min=1),
    metavar="N",
    help="Closed loop: so many clients, each with one request at a time.",
)
@click.option(
    "--trace",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Arrival times and lengths from a trace: Azure's CSV or Mooncake's JSONL.",
)
@click.option(
    "--dataset-path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Prompts from a JSONL file: prompt, messages, ShareGPT's conversations, or lines of "
    "OpenAI's Batch API.",
)
@click.option(
    "--output-len",
    type=click.IntRange(1, 1 << 30),
    default=128,
    show_default=True,
    help="max_tokens of lines of --dataset-path that have none.",
)
@click.option(
    "--random-input-len",
    type=click.IntRange(1, 1 << 24),
    default=1024,
    show_default=True,
    help="Tokens of a random prompt.",
)
@click.option(
    "--random-output-len",
    type=click.IntRange(1, 1 << 24),
    default=128,
    show_default=True,
    help="Tokens of an answer to it.",
)
@click.option(
    "--random-range-ratio",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.0,
    show_default=True,
    help="Draw both lengths from (1 - ratio) to (1 + ratio) times theirs.",
)
@click.option(
    "--random-prefix-len",
    type=click.IntRange(0, 1 << 24),
    default=0,
    show_default=True,
    help="Tokens before a random prompt that all prompts share.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 63) - 1),
    default=0,
    show_default=True,
    help="Of arrivals and prompts. The same seed sends the same prompts, which the server may "
    "still have in its prefix cache.",
)
@click.option("--ignore-eos", is_flag=True, help="Ask for answers of the full length.")
@click.option(
    "--extra-body",
    metavar="JSON",
    help="Fields of each request's body, such as '{\"temperature\": 0}'; null removes a field.",
)
@click.option(
    "--num-warmups",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests before the measurement. The first shows whether the server answers.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="A request fails when nothing came for so long.",
)
@click.argument("more_limits", nargs=-1, metavar="")  # of --goodput, as vLLM takes them: unquoted
@click.option(
    "--goodput",
    multiple=True,
    metavar="NAME:MS …",
    help="Count requests within limits: ttft:500 tpot:50, also e2el.",
)
@click.option(
    "--percentile-metrics", default="ttft,tpot,itl,e2el", show_default=True, help="Metrics to show."
)
@click.option(
    "--metric-percentiles", default="90,99", show_default=True, help="Percentiles to show."
)
@click.option(
    "--api-key", metavar="KEY", help="Sent as a bearer token.  [default: $OPENAI_API_KEY]"
)
@click.option(
    "--save",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a record of each request to this new file, a JSON object per line.",
)
@click.option(
    "--against", metavar="URL2", help="Measure this server too, in turns, and print ratios."
)
@click.option(
    "--against-model", metavar="NAME", help="The model of --against.  [default: its first]"
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help=f"With --against: rounds of one run on each server.  [default: {DEFAULT_ROUNDS}]",
)
@debug_option
def serve(
    url: str,
    model: str | None,
    endpoint: str,
    num_prompts: int | None,
    duration: float | None,
    request_rate: float,
    burstiness: float,
    max_concurrency: int | None,
    trace: Path | None,
    dataset_path: Path | None,
    output_len: int,
    extra_body: str | None,
    ignore_eos: bool,
    num_warmups: int,
    timeout: float,
    goodput: tuple[str, ...],
    more_limits: tuple[str, ...],
    percentile_metrics: str,
    metric_percentiles: str,
    api_key: str | None,
    save: Path | None,
    against: str | None,
    against_model: str | None,
    rounds: int | None,
    seed: int,
    **random: Any,
) -> None:
    """Send requests to an OpenAI-compatible server and measure its answers: TTFT (time to first
    token), TPOT (time per token after it), ITL (between tokens), E2EL (whole answers), throughput.

    \b
    pellucid bench serve --url http://127.0.0.1:8000/v1 --max-concurrency 8
    pellucid bench serve --url … --request-rate 2 --goodput ttft:500 tpot:50
    pellucid bench serve --url … --against http://127.0.0.1:8080/v1

    Without --max-concurrency and --request-rate all requests are sent at once. Failed requests are
    counted and are in no other figure. Ctrl-C ends the run with the result so far.
    """
    from ..measure.load import LoadSettings
    from ..measure.load_client import check_url
    from ..measure.load_rounds import LoadPlan
    from ..measure.load_statistics import parse_goodput, parse_names, parse_percentiles

    # What can be refused before anything is sent.
    if more_limits and not goodput:
        raise click.UsageError(f"{more_limits[0]!r} belongs to no option")
    if trace is not None and dataset_path is not None:
        raise click.UsageError("--trace and --dataset-path exclude each other")
    if against is None and (against_model is not None or rounds is not None):
        raise click.UsageError("--against-model and --rounds need --against")
    if save is not None and save.exists():
        raise ConfigError(f"--save: {save} exists already")
    urls = [check_url(url)] + ([check_url(against, "--against")] if against else [])
    if num_prompts is None and duration is None and trace is None:
        num_prompts = DEFAULT_PROMPTS
    settings = LoadSettings(
        num_prompts, duration, max_concurrency, ignore_eos, _extra_body(extra_body)
    )
    plan = LoadPlan(
        urls=tuple(urls),
        models=(model, against_model)[: len(urls)],
        api_key=api_key if api_key is not None else os.environ.get("OPENAI_API_KEY"),
        timeout=timeout,
        settings=settings,
        request_rate=request_rate,
        burstiness=burstiness,
        seed=seed,
        num_warmups=num_warmups,
        rounds=1 if against is None else rounds or DEFAULT_ROUNDS,
        goodput=parse_goodput((*goodput, *more_limits)),
        percentiles=tuple(parse_percentiles(metric_percentiles)),
        metrics=tuple(parse_names(percentile_metrics)),
        path="chat/completions" if endpoint == "chat" else "completions",
        trace=trace,
        dataset=dataset_path,
        output_length=output_len,
        random_input=random["random_input_len"],
        random_output=random["random_output_len"],
        random_range_ratio=random["random_range_ratio"],
        random_prefix=random["random_prefix_len"],
    )
    _run(plan, save)


def _run(plan: "LoadPlan", save: Path | None) -> None:
    """Run to the end or until Ctrl-C, then print what there is."""
    import asyncio

    from ..measure.load_rounds import RoundResults, run_rounds
    from .signals import cancel_instead

    results = RoundResults(plan)

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        with cancel_instead(lambda: loop.call_soon_threadsafe(task.cancel)):
            try:
                await run_rounds(results, _show_progress)
            except asyncio.CancelledError:
                if not results.runs:
                    raise

    interrupted = False
    try:
        asyncio.run(run())
    except KeyboardInterrupt:
        interrupted = True
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", err=True, nl=False)
    if not any(measured.run.records for measured in results.runs):
        if interrupted:
            raise KeyboardInterrupt
        raise RequestError("no request was sent: --duration ended before the first was due")
    # Show the result.
    if len(plan.urls) == 1:
        print_run(results.runs[0], plan)
        report = results.report(results.runs[0])
    else:
        report = print_ratios(results)
    if save is not None:
        save_records(save, results)
    if interrupted:
        unfinished = sum(measured.run.num_unfinished for measured in results.runs)
        say(f"interrupted; {unfinished} unfinished requests are in no figure")
    click.echo(json.dumps({**report, "complete": not interrupted}))
    if interrupted:
        raise click.exceptions.Exit(130)
    if all(measured.summary["completed"] == 0 for measured in results.runs):
        raise click.exceptions.Exit(1)


def _extra_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        return parse_json(text.encode(), "--extra-body")
    except FormatError as error:
        raise ConfigError(str(error)) from None


def _show_progress(what: str, sent: int, answered: int, failed: int) -> None:
    """On a terminal: how far the run is."""
    if sys.stderr.isatty():
        line = f"{what}{sent} sent · {answered - failed} answered · {failed} failed"
        click.echo(f"\r\x1b[K{line}", err=True, nl=False)
