"""Hashes of tensors that llama-quantize made, as golden.json: what tests/unit/test_encoders.py and
tests/real/test_quantize_real.py hold our encoders to.

    PYTHONPATH=src python tests/golden/quantize/make_golden.py LLAMA_QUANTIZE MODELS

LLAMA_QUANTIZE is the program (of llama.cpp in llama-cpp-python 0.3.36, compiled by gcc 12 with -O3
for plain x86-64, so that no product is fused with a sum), MODELS the folder of real models. Each
tensor goes through `llama-quantize --pure` once for each type, without and with an importance
matrix.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))
from pellucid.formats import encode_dense  # noqa: E402
from pellucid.weights.gguf import GGUFFile  # noqa: E402
from pellucid.weights.gguf_writer import write_gguf  # noqa: E402
from tests.unit.quantize_tensors import (  # noqa: E402
    REAL_FILES,
    REAL_MODELS,
    REAL_TENSORS,
    SYNTHETIC,
    Floats,
    digest,
    formats_for,
    heavy_tailed,
    importance_of,
    real_rows,
    zeros_of_both_signs,
)

METADATA = {
    "general.architecture": "llama",
    "llama.context_length": 512,
    "llama.embedding_length": 1024,
    "llama.block_count": 1,
    "llama.feed_forward_length": 1024,
    "llama.attention.head_count": 16,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
NAME = "blk.0.attn_q.weight"


def main(program: str, models: Path) -> None:
    tensors = {
        name: heavy_tailed(*shape, seed) for seed, (name, shape) in enumerate(SYNTHETIC.items())
    }
    tensors["zeros"] = zeros_of_both_signs()
    for model in REAL_MODELS:
        for name in REAL_TENSORS:
            tensors[f"{model}/{name}"] = real_rows(models / f"{model}.gguf", name)
    golden = {
        "made_by": "llama-quantize of llama-cpp-python 0.3.36",
        "tensors": {name: hashes(program, x) for name, x in tensors.items()},
        "files": {
            f"{model} {file_type}": file_hash(program, models / f"{model}.gguf", file_type)
            for model, file_type in REAL_FILES
        },
    }
    path = Path(__file__).with_name("golden.json")
    path.write_text(json.dumps(golden, indent=1) + "\n")
    print(path)


def hashes(program: str, x: Floats) -> dict[str, list[str]]:
    """Format -> hashes without and with an importance matrix."""
    found: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, matrix, out = (Path(folder) / n for n in ("f32.gguf", "imatrix.gguf", "out.gguf"))
        write_gguf(source, METADATA, [(NAME, encode_dense(x))])
        importance = importance_of(x.shape[1], 7)
        write_gguf(
            matrix,
            {
                "general.type": "imatrix",
                "imatrix.datasets": ["none"],
                "imatrix.chunk_count": 1,
                "imatrix.chunk_size": 512,
            },
            [
                (f"{NAME}.in_sum2", encode_dense(importance[None])),
                (f"{NAME}.counts", encode_dense(np.ones((1, 1), np.float32))),
            ],
        )
        for format in formats_for(x.shape[1]):
            found[format] = []
            for options in ([], ["--imatrix", str(matrix)]):
                command = [program, "--pure", *options, str(source), str(out), format]
                subprocess.run(command, check=True, capture_output=True)
                with GGUFFile.open(out) as file:
                    tensor = file.tensor(NAME)
                assert tensor.format == format, (tensor.format, format)
                found[format].append(digest(tensor.data))
    return found


def file_hash(program: str, model: Path, file_type: str) -> str:
    """The hash of a whole file, quantized again from a real one."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.gguf"
        command = [program, "--allow-requantize", str(model), str(out), file_type]
        subprocess.run(command, check=True, capture_output=True)
        return hashlib.sha256(out.read_bytes()).hexdigest()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
