"""Quantizing real models: llama-quantize's bytes, and a model that still predicts its text."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pellucid.engine_config import EngineConfig
from pellucid.formats import quantize
from pellucid.measure.evaluation import open_evaluation
from pellucid.measure.perplexity import PROTOCOLS, Perplexity
from pellucid.quant.quantize import plan_quantization, write_quantized
from pellucid.quant.source import open_source
from pellucid.quant.type_map import find_file_type
from tests.unit.quantize_tensors import (
    REAL_FILES,
    REAL_MODELS,
    REAL_TENSORS,
    digest,
    importance_of,
    real_rows,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "quantize" / "golden.json").read_text())

# "Final estimate" of `llama-perplexity -f wiki.test.raw --chunks 2` on the files that `pellucid
# quantize smollm2-135m-instruct OUT --allow-requantize --to TYPE` wrote, and its error bar. f16,
# bf16, q5_k_s, q5_1, q4_k_m, q4_k_s and q4_1 by llama.cpp 0c1e570, the others by that of
# llama-cpp-python 0.3.36
LLAMA_PERPLEXITY = {
    "f32": (21.3753, 3.1285),
    "f16": (21.3700, 3.1274),
    "bf16": (21.4026, 3.1347),
    "q8_0": (21.4266, 3.1256),
    "q6_k": (21.5809, 3.1749),
    "q5_k_m": (23.1367, 3.4917),
    "q5_k_s": (23.4135, 3.5290),
    "q5_1": (24.3521, 3.6563),
    "q5_0": (22.4311, 3.2401),
    "q4_k_m": (22.3648, 3.2849),
    "q4_k_s": (22.3461, 3.2818),
    "q4_1": (21.4582, 3.1438),
    "q4_0": (25.7244, 3.7985),
    "iq4_nl": (27.4415, 4.1542),
    "iq4_xs": (27.95, 4.2716),
    "q3_k_l": (24.9038, 3.6891),
    "q3_k_m": (24.3305, 3.6327),
    "q3_k_s": (28.8618, 4.1166),
    "q2_k": (28.8618, 4.1166),
}


@pytest.mark.parametrize("model", REAL_MODELS)
@pytest.mark.parametrize("name", REAL_TENSORS)
def test_tensors_have_the_bytes_of_llama_quantize(
    model: str, name: str, real_model: Callable[[str], Path]
) -> None:
    x = real_rows(real_model(model), name)
    importance = importance_of(x.shape[1], 7)
    golden = GOLDEN["tensors"][f"{model}/{name}"]
    made = {
        format: [digest(quantize(x, format, given).data) for given in (None, importance)]
        for format in golden
    }
    assert made == golden


def quantized(model: Path, out: Path, file_type: str) -> Path:
    with open_source(model) as source:
        plan = plan_quantization(source, find_file_type(file_type), allow_requantize=True)
        assert len(list(write_quantized(source, out, plan))) == len(plan.after)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("model", "file_type"), REAL_FILES)
def test_whole_files_are_those_of_llama_quantize(
    model: str, file_type: str, real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    out = quantized(real_model(model), tmp_path / "out.gguf", file_type)
    found = hashlib.sha256(out.read_bytes()).hexdigest()
    assert found == GOLDEN["files"][f"{model} {file_type}"]


@pytest.mark.slow
@pytest.mark.parametrize("file_type", LLAMA_PERPLEXITY)
def test_a_written_file_predicts_text_as_it_does_in_llama_cpp(
    file_type: str, real_model: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    path = quantized(real_model(REAL_MODELS[0]), tmp_path / "out.gguf", file_type)
    text = (data_dir / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    config = EngineConfig(backend="native")
    with open_evaluation(path, config, text, PROTOCOLS["llama.cpp"], chunks=2) as evaluation:
        *_, result = evaluation.run()
    assert isinstance(result, Perplexity)
    theirs, error = LLAMA_PERPLEXITY[file_type]
    # activations are rounded to eight bits in another way: a tenth of the error bar
    assert abs(result.perplexity - theirs) < error / 10


@pytest.mark.slow
def test_quantizing_takes_the_memory_of_a_tensor_and_not_of_the_model(
    real_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The 1.5B model, of 1.1 GB: the largest tensor takes 0.2 GB, and its values in slices."""
    model = real_model("qwen2.5-coder-1.5b-q4")
    to = [str(model), str(tmp_path / "out.gguf"), "--to", "q5_k_s", "--allow-requantize"]
    # A process begins with the memory of the one that starts it, so a small one stands between.
    between = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=-3); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, "-c", between, sys.executable, "-m", "pellucid", "quantize", *to]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) * 1024 < 800 << 20  # 0.3 GiB are seen
