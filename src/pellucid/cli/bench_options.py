"""Options that the benchmarks of a model share, with llama-bench's names."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ..backends.registry import BACKENDS
from .bench_table import FORMATS

__all__ = ["BenchOptions", "Numbers", "Pair", "bench_options", "size_options"]

MAX_VALUES = 64  # of one list
_Command = Callable[..., Any]


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """Whole numbers with commas between them."""

    name = "N,…"

    def __init__(self, least: int, most: int = 1 << 24) -> None:
        self._least, self._most = least, most

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        words = str(value).split(",")
        if len(words) > MAX_VALUES:
            self.fail(
                f"{len(words)} values are given; at most {MAX_VALUES} are allowed", param, ctx
            )
        try:
            numbers = tuple(int(word) for word in words)
        except ValueError:
            self.fail(f"{value!r} must be whole numbers with commas between: 512,1024", param, ctx)
        for number in numbers:
            if not self._least <= number <= self._most:
                self.fail(f"{number} is not between {self._least} and {self._most}", param, ctx)
        return tuple(dict.fromkeys(numbers))


class Pair(click.ParamType):  # type: ignore[type-arg]
    """A length of a prompt and one of an output."""

    name = "PP,TG"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        numbers = Numbers(0).convert(str(value).replace("+", ","), param, ctx)
        words = str(value).replace("+", ",").split(",")
        if len(words) != 2 or not any(numbers):
            self.fail(f"{value!r} must be two lengths: 512,128", param, ctx)
        return int(words[0]), int(words[1])


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What `bench_options` gathered."""

    models: tuple[str, ...]
    threads: tuple[int, ...]  # empty: as many as there are CPUs
    backend: str
    isa: str | None
    kv_dtype: str
    quantization: str | None
    repetitions: int
    roof: bool
    against: str | None
    llama_cpp: str | None
    peer_python: str | None
    form: str

    def backend_options(self, threads: int) -> dict[str, object]:
        """As `BenchModel` takes them."""
        if self.backend != "native":
            return {}
        isa = {} if self.isa is None else {"isa": self.isa}
        return {"threads": threads, **isa}

    def paths(self) -> list[Path]:
        """The models, found or fetched."""
        from ..weights.hub import resolve_model

        return [resolve_model(name, cache_dir=None, progress=True) for name in self.models]

    def thread_counts(self) -> tuple[int, ...]:
        if self.threads:
            return self.threads
        from ..backends.native.backend import available_cpus

        return (available_cpus(),)


def bench_options(command: _Command) -> _Command:
    """The models and how they are measured: the command gets them as one argument, `options`."""

    @functools.wraps(command)
    def gather(*args: Any, **rest: Any) -> Any:
        fields = {name: rest.pop(name) for name in BenchOptions.__slots__}
        if fields["against"] is not None and fields["quantization"] is not None:
            raise click.UsageError("--quantization changes the model, which --against compares")
        return command(*args, options=BenchOptions(**fields), **rest)

    for option in reversed(_OPTIONS):
        gather = option(gather)
    return gather


_OPTIONS = (
    click.argument("models", nargs=-1, required=True, metavar="MODEL…"),
    click.option(
        "-t", "--threads", type=Numbers(1, 256), default=(), help="Threads.  [default: all CPUs]"
    ),
    click.option(
        "--backend",
        type=click.Choice(list(BACKENDS)),
        default="native",
        show_default=True,
        help="What computes.",
    ),
    click.option("--isa", help="Kernels of the native backend, by their instruction set."),
    click.option(
        "--kv-dtype", default="auto", show_default=True, help="What keys and values are kept in."
    ),
    click.option(
        "--quantization",
        metavar="TYPE",
        help="Quantize a float model while it is loaded: int8, w8a8, or a type of GGUF files.",
    ),
    click.option(
        "-r",
        "--repetitions",
        type=click.IntRange(1, 10_000),
        default=5,
        show_default=True,
        help="How often each row is measured; with --against, the rounds.",
    ),
    click.option(
        "--roof/--no-roof",
        default=True,
        help="Show the share of the machine's ceiling (native backend).  [default: yes]",
    ),
    click.option(
        "--against",
        type=click.Choice(["llama.cpp", "vllm", "transformers"]),
        help="Measure this engine on the same file in turns, and show how many times as fast ours "
        "is.",
    ),
    click.option(
        "--llama-cpp",
        metavar="FOLDER",
        help="Where llama-bench and llama-batched-bench lie.  [default: on PATH, else "
        "llama-cpp-python]",
    ),
    click.option(
        "--peer-python",
        metavar="PATH",
        help="The interpreter that has the peer's package.  [default: this one]",
    ),
    click.option(
        "-o",
        "--output",
        "form",
        type=click.Choice(FORMATS),
        default="table",
        show_default=True,
        help="The table ends with a line of JSON.",
    ),
)


def size_options(command: _Command) -> _Command:
    """Sizes of a step, as in llama.cpp: the arguments `batch_size` and `ubatch_size`."""
    batch = click.option(
        "-b",
        "--batch-size",
        type=Numbers(1),
        default="2048",
        show_default=True,
        help="Tokens of a prompt that are handed over at once.",
    )
    ubatch = click.option(
        "-ub",
        "--ubatch-size",
        type=Numbers(1),
        default="512",
        show_default=True,
        help="Tokens of a prompt in a step; at most --batch-size.",
    )
    return batch(ubatch(command))
