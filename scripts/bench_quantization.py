"""What quantization costs: the mean KL divergence from the base, of each method beside another one
at equal bytes and equal formats of all tensors.

    scripts/bench quantization [MODEL ...] [--types q4_k_m,awq-int4-g128] [--llama-cpp FOLDER]
                               [--calibration FILE] [--calibration-chunks 32] [--chunks 16]
                               [--backend native|reference] [--work FOLDER]

MODEL is a GGUF file or a name; by default SmolLM2-135M and Qwen2.5-Coder 0.5B. The weights of a
file that is quantized already lie on a grid, and a quantizer that finds this grid again would seem
to lose nothing. So the base is the file decoded to float32, with noise that is uniform over one
step of the grid.

Types of GGUF files: error feedback beside llama.cpp with its importance matrix. Types of folders
(GPTQ, AWQ, SmoothQuant): the type's own method beside the nearest values. A type with -auto behind
it, such as q4_k_m-auto: error feedback with formats chosen by damage, within the same bytes.

--llama-cpp is the folder of llama-imatrix and llama-quantize. Without it our own encoder, which
gives the same bytes, stands in for them.

Evaluated are the first --chunks chunks of 512 tokens of WikiText-2's test text (a file of the
folder PELLUCID_DATA) and of a part of Python's standard library. Both sides are calibrated on the
same text: C4, WikiText-2's validation text and another part of the library in turns, half of it
code; or FILE. The error of a ratio is that of both means, as if they were independent. Bases, their
logits and importance matrices are kept in the folder of --work. The backend native also rounds
activations, as a user's run does; reference does not. The last line is JSON.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pellucid.engine_config import EngineConfig
from pellucid.formats import HostTensor, dequantize, encode_dense, get_format
from pellucid.formats.codes import GRIDS, grid_of
from pellucid.measure.divergence import Divergence
from pellucid.measure.evaluation import open_evaluation
from pellucid.measure.perplexity import PROTOCOLS, Estimate
from pellucid.quant.folder_types import FolderType, find_type
from pellucid.quant.source import open_source
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf
from pellucid.weights.hub import resolve_model

AUTO = "-auto"
MODELS = ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"]
TYPES = "q4_k_m,gptq-int4-g128-actorder,gptq-int3-g128-actorder,awq-int4-g128,w8a8"
# parts of Python's standard library
EVALUATED_CODE = ("argparse.py", "email", "http", "json", "tarfile.py", "zipfile.py")
CALIBRATION_CODE = ("asyncio", "concurrent", "importlib", "logging", "multiprocessing", "unittest")
# characters of each text, in turns, of which the calibration text consists
PIECES = {"c4": 4096, "wikitext": 4096, "code": 8192}


def write_base(model: Path, base: Path) -> None:
    """The model in float32, with noise in the place of its grids."""
    with open_source(model) as source:
        write_gguf(
            base,
            {**source.metadata, "general.file_type": 0},
            ((name, _dithered(source.tensor(name), i)) for i, name in enumerate(source.specs)),
        )


def _dithered(tensor: HostTensor, seed: int) -> HostTensor:
    values = dequantize(tensor)
    if tensor.format not in GRIDS:
        return encode_dense(values)
    blocks = tensor.data.reshape(-1, get_format(tensor.format).block_bytes)
    parts = np.array_split(blocks, len(blocks) // 65536 + 1)  # grids of a part take its memory
    step = np.concatenate([grid_of(part, tensor.format).step.ravel() for part in parts])
    noise = np.random.default_rng(seed).random(values.shape, np.float32) - np.float32(0.5)
    return encode_dense(values + noise * step.reshape(values.shape))


def read_code(names: tuple[str, ...]) -> str:
    """The source of some files and packages of the standard library, without their tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        file
        for name in names
        for file in (
            sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]
        )
        if "test" not in file.relative_to(root).parts
    ]
    return "\n".join(file.read_text() for file in files)


def calibration_text(data: Path) -> str:
    texts = {
        "c4": (data / "calibration" / "c4.txt").read_text(),
        "wikitext": (data / "wikitext-2" / "wiki.valid.raw").read_text(),
        "code": read_code(CALIBRATION_CODE),
    }
    places = dict.fromkeys(texts, 0)
    pieces: list[str] = []
    for name in cycle(texts):
        piece = texts[name][places[name] : places[name] + PIECES[name]]
        if not piece:
            return "".join(pieces)
        pieces.append(piece)
        places[name] += len(piece)
    raise AssertionError


class Spent(NamedTuple):
    """What a command took."""

    seconds: float
    cpu_seconds: float  # of all its threads: with one thread, what it takes on a quiet machine
    peak_bytes: int


class Bench:
    """One model: its base, the texts, and what was measured."""

    def __init__(self, model: Path, args: argparse.Namespace) -> None:
        self._args = args
        self._folder = Path(args.work, model.stem)
        self._folder.mkdir(parents=True, exist_ok=True)
        self.base = self._folder / "base.gguf"
        if not self.base.exists():
            write_base(model, self.base)
        data = Path(os.environ["PELLUCID_DATA"])
        self._texts = {
            "wiki": (data / "wikitext-2" / "wiki.test.raw").read_text(),
            "code": read_code(EVALUATED_CODE),
        }
        self._calibration = args.calibration
        if args.calibration is None:
            self._calibration = self._folder / "calibration.txt"
            self._calibration.write_text(calibration_text(data))

    def measure(self, file: Path) -> dict[str, Divergence]:
        return {name: self._divergence(file, name) for name in self._texts}

    def _divergence(self, file: Path, text: str) -> Divergence:
        chunks = self._args.chunks
        logits = self._folder / f"{text}-{chunks}.logits"
        found: Divergence | None = None
        with open_evaluation(
            file,
            EngineConfig(backend=self._args.backend),
            self._texts[text],
            PROTOCOLS["llama.cpp"],
            chunks=chunks,
            base_path=None if logits.exists() else self.base,
            logits_file=logits,
        ) as evaluation:
            for result in evaluation.run():
                if isinstance(result, Divergence):
                    found = result
        if found is None:
            raise AssertionError("nothing was compared")
        return found

    def theirs(self, file_type: str) -> Path:
        """llama.cpp's file, or our own with the same bytes."""
        args, out = self._args, self._folder / f"{file_type}-imatrix.gguf"
        name = self._calibration.stem
        matrix = self._folder / f"{name}-{args.calibration_chunks}.imatrix.gguf"
        if args.llama_cpp is None:
            if not matrix.exists():
                chunks = ["--chunks", args.calibration_chunks]
                run_pellucid(
                    "imatrix", self.base, "--text", self._calibration, "-o", matrix, *chunks
                )
            run_pellucid("quantize", self.base, out, "--to", file_type, "--imatrix", matrix)
            return out
        if not matrix.exists():
            command = ["-m", self.base, "-f", self._calibration, "-o", matrix]
            chunks = ["-c", 512, "--chunks", args.calibration_chunks]
            run([args.llama_cpp / "llama-imatrix", *command, *chunks])
        quantizer = args.llama_cpp / "llama-quantize"
        run([quantizer, "--imatrix", matrix, self.base, out, file_type.upper()])
        return out

    def ours(self, file_type: str) -> tuple[Path, Spent]:
        """Our file, and what it took."""
        out = self._folder / f"{file_type}-ef.gguf"
        name = file_type.removesuffix(AUTO)
        options = () if name == file_type else ("--type-map", "auto")
        spent = run_pellucid(
            *("quantize", self.base, out, "--to", name, "--method", "ef", *options),
            *("--calibration", self._calibration),
            *("--calibration-chunks", self._args.calibration_chunks),
        )
        return out, spent

    def folder(self, file_type: str, *, calibrated: bool) -> tuple[Path, Spent]:
        """A folder by the type's method or with the nearest values, and what it took."""
        out = self._folder / f"{file_type}-{'calibrated' if calibrated else 'nearest'}"
        shutil.rmtree(out, ignore_errors=True)
        options: tuple[object, ...] = ("--method", "rtn")
        if calibrated:
            chunks = self._args.calibration_chunks
            options = ("--calibration", self._calibration, "--calibration-chunks", chunks)
        return out, run_pellucid("quantize", self.base, out, "--to", file_type, *options)


def run_pellucid(*arguments: object) -> Spent:
    return run([sys.executable, "-m", "pellucid", *arguments])


def run(command: list[Any]) -> Spent:
    """Run a command, and return what it took.

    A process begins with the memory of the one that starts it, so a small one stands between.
    """
    between = (
        "import resource, subprocess, sys;"
        "code = subprocess.run(sys.argv[1:], stdout=2).returncode;"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(used.ru_utime + used.ru_stime, used.ru_maxrss); sys.exit(code)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", between, *map(str, command)], capture_output=True)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr.decode(errors='replace')[-2000:]}")
    cpu_seconds, peak_kib = done.stdout.split()
    return Spent(time.perf_counter() - start, float(cpu_seconds), int(peak_kib) * 1024)


def formats_of(path: Path) -> dict[str, str]:
    with GGUFFile.open(path) as file:
        return {name: tensor.format for name, tensor in file.tensors.items()}


def bytes_of(path: Path) -> int:
    """Of a file, or of all files of a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def rows_of(bench: Bench, file_type: str) -> Iterator[dict[str, Any]]:
    """A row for each text."""
    name = file_type.removesuffix(AUTO)
    found = find_type(name)
    if isinstance(found, FolderType):
        theirs = bench.folder(file_type, calibrated=False)[0]
        ours, spent = bench.folder(file_type, calibrated=True)
    else:
        theirs = bench.theirs(found.name)
        ours, spent = bench.ours(file_type)
        if name == file_type and formats_of(theirs) != formats_of(ours):
            sys.exit(f"{theirs} and {ours} differ in the formats of their tensors")
    reference = bench.measure(theirs)
    for text, own in bench.measure(ours).items():
        other = reference[text]
        yield {
            "type": file_type,
            "file_bytes": bytes_of(ours),
            "text": text,
            "kl": own.kl.value,
            "kl_error": own.kl.error,
            "kl_theirs": other.kl.value,
            "kl_theirs_error": other.kl.error,
            "ratio": own.kl.value / other.kl.value,
            "ratio_error": ratio_error(own.kl, other.kl),
            "same_top": own.same_top.value,
            "same_top_theirs": other.same_top.value,
            "perplexity": own.model.perplexity,
            "perplexity_theirs": other.model.perplexity,
            "perplexity_base": own.base.perplexity,
            "seconds": spent.seconds,
            "cpu_seconds": spent.cpu_seconds,
            "memory_beyond_model": spent.peak_bytes - bench.base.stat().st_size,
        }


def ratio_error(a: Estimate, b: Estimate) -> float:
    relative: float = np.hypot(a.error / a.value, b.error / b.value)
    return a.value / b.value * relative


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--types", default=TYPES, help="as in pellucid quantize --to")
    parser.add_argument("--llama-cpp", type=Path, metavar="FOLDER")
    parser.add_argument("--calibration", type=Path, metavar="FILE")
    parser.add_argument("--calibration-chunks", type=int, default=32)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--backend", choices=["native", "reference"], default="native")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir(), "pellucid-bench"))
    args = parser.parse_args()

    report = []
    for name in args.models:
        path = resolve_model(name)
        bench = Bench(path, args)
        encoder = "our encoder" if args.llama_cpp is None else "llama.cpp"
        print(f"{path.name}; other: {encoder} with an importance matrix; nearest values in folders")
        print(
            f"{'type':24} {'MB':>6} {'text':5} {'KL, other':>17} {'KL, ours':>17} {'ratio':>13} "
            f"{'same top':>15} {'perplexity: base':>16} {'other':>7} {'ours':>7} "
            f"{'s':>5} {'CPU s':>5} {'MB+':>5}"
        )
        for file_type in args.types.split(","):
            for row in rows_of(bench, file_type):
                report.append({"model": path.name, **row})
                print(line_of(row), flush=True)
    print(json.dumps(report))


def line_of(row: dict[str, Any]) -> str:
    return (
        f"{row['type']:24} {row['file_bytes'] / 1e6:6.1f} {row['text']:5} "
        f"{row['kl_theirs']:8.5f} ±{row['kl_theirs_error']:7.5f} "
        f"{row['kl']:8.5f} ±{row['kl_error']:7.5f} "
        f"{row['ratio']:6.3f} ±{row['ratio_error']:5.3f} "
        f"{row['same_top_theirs']:7.1%} {row['same_top']:7.1%} "
        f"{row['perplexity_base']:16.3f} {row['perplexity_theirs']:7.3f} {row['perplexity']:7.3f} "
        f"{row['seconds']:5.0f} {row['cpu_seconds']:5.0f} {row['memory_beyond_model'] / 1e6:5.0f}"
    )


if __name__ == "__main__":
    main()
