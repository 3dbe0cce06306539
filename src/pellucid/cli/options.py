"""Options that several commands share, and what is made of them. Names and meanings are vLLM's."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args

import click

from ..config import Batching, Preemption, SchedulingPolicy
from ..request import SamplingParams
from ..weights.catalogue import DEFAULT_MODEL

__all__ = [
    "DEBUG",
    "EngineOptions",
    "ModelOptions",
    "debug_option",
    "engine_options",
    "json_option",
    "model_options",
    "sampling_options",
    "sampling_params",
]

DEBUG = "pellucid.debug"  # in click's Context.meta: show tracebacks

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _set_debug(context: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        context.meta[DEBUG] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_set_debug,
    help="Show a traceback where something fails.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object, for programs."
)


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What `model_options` gathered: which model, and how it is run."""

    name: str
    max_model_len: int | None
    backend: str
    threads: int | None
    isa: str | None
    kv_cache_dtype: str

    def fields(self) -> dict[str, Any]:
        """As `EngineConfig` takes them."""
        names = ("max_model_len", "backend", "threads", "isa", "kv_cache_dtype")
        said = {name: getattr(self, name) for name in names}
        return {name: value for name, value in said.items() if value is not None}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What `engine_options` gathered: how many requests share the engine. The names are
    `EngineConfig`'s.
    """

    values: dict[str, Any]

    def fields(self) -> dict[str, Any]:
        """As `EngineConfig` takes them; what was not said keeps its default."""
        return {name: value for name, value in self.values.items() if value is not None}


class _Memory(click.ParamType):  # type: ignore[type-arg]
    """Bytes, with a unit or without; or a share of what is free."""

    name = "SIZE"
    units: ClassVar[dict[str, int]] = {
        "GiB": 1 << 30,
        "MiB": 1 << 20,
        "KiB": 1 << 10,
        "GB": 10**9,
        "MB": 10**6,
        "B": 1,
    }

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float:
        text = str(value).strip()
        unit = next((unit for unit in self.units if text.endswith(unit)), "")
        scale = self.units.get(unit, 0)
        text = text.removesuffix(unit)
        try:
            number = float(text)
        except ValueError:
            self.fail(
                f"{value!r} is not a size: give bytes, 512MiB, 4GiB, or a share of free memory "
                "such as 0.5",
                param,
                ctx,
            )
        if not 0 < number < 1 << 62:
            self.fail(f"{value!r} is not a size above 0", param, ctx)
        return int(number * scale) if scale else number if number < 1 else int(number)


class _Gibibytes(_Memory):
    """GiB where no unit is given, as vLLM's swap_space; or a size with its unit."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        try:
            return float(value)
        except ValueError:
            return super().convert(value, param, ctx) / (1 << 30)


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What concerns many requests at once: the command gets it as one argument, `engine`."""
    names = (
        "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory", "block_size", "enable_prefix_caching", "scheduling_policy", "batching",
        "preemption", "swap_space",
    )  # fmt: skip

    @functools.wraps(command)
    def gather(*args: Any, **rest: Any) -> Any:
        return command(
            *args, engine=EngineOptions({name: rest.pop(name) for name in names}), **rest
        )

    wrapped: Callable[..., Any] = gather
    for option in (
        click.option(
            "--swap-space",
            type=_Gibibytes(),
            help="Size of the file to which evicted blocks are saved, in GiB or with a unit.  [default: 1]",
        ),
        click.option(
            "--preemption",
            type=click.Choice(get_args(Preemption)),
            help="What becomes of blocks that must go: computed again, saved, or what costs less here.  [default: auto]",
        ),
        click.option(
            "--batching",
            type=click.Choice(get_args(Batching)),
            help="When waiting requests may join: at every step, or when the batch has ended.  [default: continuous]",
        ),
        click.option(
            "--scheduling-policy",
            type=click.Choice(get_args(SchedulingPolicy)),
            help="Who is next.  [default: fcfs]",
        ),
        click.option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            default=None,
            help="Compute common beginnings once.  [default: yes]",
        ),
        click.option(
            "--block-size", type=int, metavar="N", help="Tokens per KV block.  [default: 16]"
        ),
        click.option(
            "--kv-cache-memory",
            type=_Memory(),
            help="Memory for keys and values, or a share of what is free.",
        ),
        click.option(
            "--max-num-batched-tokens",
            type=int,
            metavar="N",
            help="Tokens that one step computes.  [default: 512]",
        ),
        click.option(
            "--max-num-seqs",
            type=int,
            metavar="N",
            help="Requests that run at once.  [default: 256]",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-m and what concerns its loading: the command gets them as one argument, `model`."""

    @functools.wraps(command)
    def gather(
        *args: Any,
        model: str,
        max_model_len: int | None,
        backend: str,
        threads: int | None,
        isa: str | None,
        kv_cache_dtype: str,
        **rest: Any,
    ) -> Any:
        return command(
            *args,
            model=ModelOptions(model, max_model_len, backend, threads, isa, kv_cache_dtype),
            **rest,
        )

    wrapped: Callable[..., Any] = gather
    for option in (
        click.option(
            "--kv-cache-dtype",
            default="auto",
            show_default=True,
            metavar="NAME",
            help="What keys and values are kept in: f32, f16, int8, int4, or two of them, K,V.",
        ),
        click.option(
            "--isa",
            metavar="NAME",
            help="Kernels: avx512, amx, avx2, neon, portable.  [default: the best that this CPU has]",
        ),
        click.option(
            "--threads",
            type=int,
            metavar="N",
            help="Threads to compute with.  [default: the CPUs that this process may use]",
        ),
        click.option(
            "--backend",
            default="native",
            show_default=True,
            metavar="NAME",
            help="native (C++), or reference (NumPy).",
        ),
        click.option(
            "--max-model-len",
            type=int,
            metavar="N",
            help="Tokens of prompt and answer together, at most.  [default: what the model was made for]",
        ),
        click.option(
            "-m",
            "--model",
            default=DEFAULT_MODEL,
            show_default=True,
            metavar="MODEL",
            help="A .gguf file, a folder of safetensors, a name (see `pellucid models`), or ORG/NAME[:QUANT] of the Hugging Face hub.",
        ),
    ):
        wrapped = option(wrapped)
    return wrapped


def sampling_options(max_tokens: int | None) -> Callable[[_Command], _Command]:
    """How tokens are chosen.

    The defaults are greedy, so that the same question has the same answer, with a mild presence
    penalty, without which small models go round in circles where nothing is left to chance. It
    reads the answer alone; a repetition penalty would shun the question's words too.
    """
    options = (
        click.option(
            "--temperature",
            type=float,
            default=0.0,
            show_default=True,
            help="0: the likeliest token each time; 1: the model's own distribution; about 0.7 for variety.",
        ),
        click.option(
            "--top-k",
            type=int,
            default=0,
            show_default=True,
            help="Keep the K likeliest tokens; 0: all.",
        ),
        click.option(
            "--top-p",
            type=float,
            default=1.0,
            show_default=True,
            help="Keep the fewest likeliest tokens that hold this probability.",
        ),
        click.option(
            "--min-p",
            type=float,
            default=0.0,
            show_default=True,
            help="Keep tokens at least this likely, relative to the likeliest.",
        ),
        click.option(
            "--presence-penalty",
            type=float,
            default=0.5,
            show_default=True,
            help="Above 0: tokens that the answer holds become less likely.",
        ),
        click.option(
            "--repetition-penalty",
            type=float,
            default=1.0,
            show_default=True,
            help="Above 1: tokens that the prompt or the answer holds become less likely.",
        ),
        click.option(
            "--max-tokens",
            type=int,
            default=max_tokens,
            show_default=max_tokens is not None,
            metavar="N",
            help="Stop after so many tokens."
            + ("" if max_tokens else "  [default: as many as the context holds]"),
        ),
        click.option(
            "--seed",
            type=int,
            default=0,
            show_default=True,
            help="Where temperature is not 0: each seed has its own answer, always the same.",
        ),
        click.option(
            "--stop",
            multiple=True,
            metavar="TEXT",
            help="Stop before this text; may be given several times.",
        ),
    )

    def decorate(command: _Command) -> _Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def sampling_params(options: dict[str, Any]) -> SamplingParams:
    """SamplingParams of the values that `sampling_options` gathered. Raises ConfigError where one
    is impossible, and names it.
    """
    return SamplingParams(**{**options, "stop": list(options["stop"])})
