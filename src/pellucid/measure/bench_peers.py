"""Other engines, measured beside ours: the protocol of a peer, and llama.cpp by its own programs.

`llama-bench` runs one repetition of one test per process, and `llama-batched-bench` one shape. Both
load every `libggml-*.so` that lies in their working directory, so they run in their own folder. The
libraries that they really mapped are read from /proc while they run, and are told.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import ConfigError, PellucidError
from .bench_start import ColdStart, PeakMeter
from .bench_tests import Test

__all__ = [
    "LlamaCpp",
    "Peer",
    "PeerFacts",
    "Setup",
    "find_program",
    "parse_batched_bench",
    "parse_llama_bench",
    "parse_version",
]

MAX_OUTPUT = 1 << 24  # characters of a peer's answer that are looked at
# our names of what keys and values are kept in -> llama.cpp's
CACHE_TYPES = {"f16": "f16", "f32": "f32", "int8": "q8_0", "int4": "q4_0"}


@dataclass(frozen=True, slots=True)
class Setup:
    """How a test is run, on either side."""

    threads: int
    batch: int = 2048  # tokens that are handed over at once
    ubatch: int = 512  # tokens of a step
    kv_dtypes: tuple[str, str] = ("f16", "f16")
    longest: int = 4096  # tokens of a sequence
    sequences: int = 1  # at once
    vocab_size: int = 32000


@dataclass(frozen=True, slots=True)
class PeerFacts:
    """What the figures of a peer depend on."""

    name: str
    version: str
    build: str  # compiler and flags; "": it does not say
    backends: tuple[str, ...]  # the libraries or devices that it computes with
    programs: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.name} {self.version}"]
        parts += [f"build: {self.build}"] if self.build else []
        parts += [f"loaded backends: {', '.join(self.backends) or 'unknown'}"]
        return "; ".join(parts)


class Peer(Protocol):
    """Another engine. Raises PellucidError where it cannot run what is asked."""

    name: str
    variants: tuple[str, ...]  # ways to run it, of which the faster counts; one of them is ""

    def open(self, path: Path, setup: Setup) -> None:
        """Take this model from now on."""
        ...

    def facts(self) -> PeerFacts:
        """Of an opened peer."""
        ...

    def run_test(self, test: Test, variant: str) -> float:
        """Seconds of one repetition."""
        ...

    def run_batch(
        self, prompt: int, output: int, sequences: int, variant: str
    ) -> tuple[float, float]:
        """Seconds of prefill and of decode, of so many sequences at once."""
        ...

    def run_requests(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> float:
        """Seconds until all requests have ended, which are there at once."""
        ...

    def run_cold(self) -> ColdStart:
        """A fresh process that loads the model and computes one token."""
        ...

    def close(self) -> None: ...


def find_program(name: str, given: str | None) -> Path:
    """The program at `given` (a file, or the folder that holds it), or on PATH."""
    if given is not None:
        path = Path(given).expanduser()
        path = path / name if path.is_dir() else path.parent / name
        if shutil.which(path) is None:
            raise ConfigError(f"{path} is not a program that can be run")
        return path.absolute()
    found = shutil.which(name)
    if found is None:
        raise ConfigError(
            f"{name} is not on PATH; install llama.cpp, or name its folder with --llama-cpp"
        )
    return Path(found).absolute()


@dataclass
class LlamaCpp:
    """llama.cpp by `llama-bench` and `llama-batched-bench`."""

    folder: str | None = None  # where its programs lie; None: on PATH
    name: str = field(default="llama.cpp", init=False)
    variants: tuple[str, ...] = field(default=("-fa 1", "-fa 0"), init=False)
    _path: Path = field(default=Path(), init=False)
    _setup: Setup = field(default=Setup(1), init=False)
    _facts: PeerFacts | None = field(default=None, init=False)

    def open(self, path: Path, setup: Setup) -> None:
        if path.suffix != ".gguf":
            raise ConfigError(f"{path} is no .gguf file, and llama.cpp reads no other")
        for dtype in setup.kv_dtypes:
            if dtype not in CACHE_TYPES:
                raise ConfigError(
                    f"llama.cpp has no KV cache of {dtype}; it must be one of: "
                    f"{', '.join(CACHE_TYPES)}"
                )
        self._path, self._setup = path.absolute(), setup

    def facts(self) -> PeerFacts:
        if self._facts is None:
            bench = find_program("llama-bench", self.folder)
            command = [bench, "-m", self._path, "-t", 1, "-p", 1, "-n", 0, "-r", 1]
            libraries: set[str] = set()
            out, err = _run(
                [*command, "-o", "json", "--no-warmup", "-v"],
                lambda pid: libraries.update(_mapped_libraries(pid)),
            )
            (run,) = parse_llama_bench(out)
            version = f"{run['build_commit']} ({run['build_number']})"
            loaded = sorted({Path(library).name for library in libraries if "ggml" in library})
            loaded = [name for name in loaded if not re.match(r"libggml(-base)?\.", name)]
            self._facts = PeerFacts(
                self.name,
                version,
                "; ".join(filter(None, [_compiler(bench), _system_info(libraries)])),
                tuple(loaded or _named_in_log(err) or [str(run.get("backends", ""))]),
                (str(bench),),
            )
        return self._facts

    def run_test(self, test: Test, variant: str) -> float:
        lengths = ["-p", test.prompt, "-n", test.output, "-d", test.depth]
        if test.prompt and test.output:
            lengths = ["-p", 0, "-n", 0, "-pg", f"{test.prompt},{test.output}", "-d", test.depth]
        bench = find_program("llama-bench", self.folder)
        out, _ = _run([bench, *self._options(), *lengths, *variant.split(), "-r", 1, "-o", "json"])
        runs = parse_llama_bench(out)
        (nanoseconds,) = runs[-1]["samples_ns"]
        return float(nanoseconds) / 1e9

    def run_batch(
        self, prompt: int, output: int, sequences: int, variant: str
    ) -> tuple[float, float]:
        batched = find_program("llama-batched-bench", self.folder)
        shape = ["-npp", prompt, "-ntg", output, "-npl", sequences]
        # its warm-up takes 16 tokens
        context = ["-c", max(64, sequences * (prompt + output))]
        out, _ = _run(
            [
                *[batched, *self._options(), *shape, *context, *variant.split()],
                *["--output-format", "jsonl"],
            ]
        )
        row = parse_batched_bench(out)[-1]
        return float(row["t_pp"]), float(row["t_tg"])

    def run_requests(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> float:
        raise PellucidError("llama.cpp's benchmarks take no requests")

    def run_cold(self) -> ColdStart:
        bench = find_program("llama-bench", self.folder)
        command = [bench, *self._options(), "-p", 1, "-n", 0, "-r", 1, "--no-warmup"]
        meters: list[PeakMeter] = []

        def watch(pid: int) -> None:
            if not meters:
                meters.append(PeakMeter(pid))

        start = time.perf_counter()
        _run([*command, "-o", "json"], watch)
        end = time.perf_counter() - start
        return ColdStart(end, end, meters[0].stop())

    def close(self) -> None:
        pass

    def _options(self) -> list[Any]:
        setup = self._setup
        k, v = (CACHE_TYPES[dtype] for dtype in setup.kv_dtypes)
        sizes = ["-b", setup.batch, "-ub", setup.ubatch]
        return ["-m", self._path, "-t", setup.threads, *sizes, "-ctk", k, "-ctv", v]


def parse_llama_bench(out: str) -> list[Mapping[str, Any]]:
    """The runs that `llama-bench -o json` printed."""
    try:
        runs = json.loads(out)
        if isinstance(runs, list) and runs and all("samples_ns" in run for run in runs):
            return runs
    except (ValueError, TypeError):
        pass
    raise PellucidError(f"llama-bench printed no result: {_shortened(out)}")


def parse_batched_bench(out: str) -> list[Mapping[str, Any]]:
    """The rows that `llama-batched-bench --output-format jsonl` printed, among other lines."""
    rows = []
    for line in out.splitlines():
        if line.startswith("{"):
            with suppress(ValueError):
                rows.append(json.loads(line))
    if not rows or not all("t_pp" in row and "t_tg" in row for row in rows):
        raise PellucidError(f"llama-batched-bench printed no result: {_shortened(out)}")
    return rows


def parse_version(text: str) -> str:
    """The compiler, of what `--version` prints."""
    found = re.search(r"^built with (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _compiler(program: Path) -> str:
    try:
        out, err = _run([program, "--version"])
    except PellucidError:  # older ones do not know the option
        return ""
    return parse_version(out + err)


def _mapped_libraries(pid: int) -> list[str]:
    """Paths of the libraries of llama.cpp that a process has mapped; Linux only."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except OSError:
        return []
    found = {line.partition("/")[2] for line in lines if "/lib" in line}
    return [f"/{path}" for path in found if re.search(r"lib(ggml|llama)[^/]*$", path)]


# Run apart, because it loads the peer's libraries.
_SYSTEM_INFO = """
import ctypes, sys
ggml, llama = sys.argv[1:]
ctypes.CDLL(ggml, ctypes.RTLD_GLOBAL).ggml_backend_load_all()
info = ctypes.CDLL(llama).llama_print_system_info
info.restype = ctypes.c_char_p
print(info().decode())
"""


def _system_info(libraries: set[str]) -> str:
    """The instruction sets that its kernels were built for, as llama.cpp itself tells them; "" for
    a program that is linked statically.
    """
    paths = [
        next((path for path in sorted(libraries) if f"/{name}.so" in path), None)
        for name in ("libggml", "libllama")
    ]
    if None in paths:
        return ""
    try:
        out, _ = _run([sys.executable, "-c", _SYSTEM_INFO, *paths], folder=Path(str(paths[0])))
    except PellucidError:
        return ""
    flags = re.findall(r"(\w+) = 1", out.splitlines()[-1] if out.strip() else "")
    return " ".join(flags)


def _named_in_log(err: str) -> list[str]:
    return [Path(path).name for path in re.findall(r"load_backend: loaded .* from (\S+)", err)]


def _run(
    command: Sequence[Any],
    watch: Callable[[int], object] | None = None,
    *,
    folder: Path | None = None,
) -> tuple[str, str]:
    """(standard output, standard error) of a program that runs in its own folder. `watch` is called
    again and again while it runs.
    """
    program = Path(command[0])
    words = [str(word) for word in command]
    try:
        process = subprocess.Popen(
            words,
            cwd=(folder or program).parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise PellucidError(f"{program} cannot be run: {error.strerror}") from None
    with process:
        try:
            while True:
                if watch is not None:
                    watch(process.pid)
                try:
                    out, err = process.communicate(timeout=0.05 if watch else None)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise PellucidError(
            f"{program.name} ended with {process.returncode}: {_shortened(_complaint(err))}"
        )
    return out[:MAX_OUTPUT], err[:MAX_OUTPUT]


def _complaint(err: str) -> str:
    """The lines of a log that say what is wrong."""
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    wrong = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    return " ".join((wrong or lines)[-2:])


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 300 else f"{text[:300]}…"
