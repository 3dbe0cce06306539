"""Hashes of the type maps of llama-quantize, as type_maps.json: what tests/unit/test_type_map.py
holds ours to.

    PYTHONPATH=src python tests/golden/quantize/make_type_maps.py LLAMA_QUANTIZE

LLAMA_QUANTIZE is the program of llama.cpp in llama-cpp-python 0.3.36. Each model of
tests/unit/type_map_models.py goes through it once for each type, without and with an importance
matrix, and each tensor's type is read from the file that it writes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from pellucid.formats import encode_dense
from pellucid.quant.type_map import FILE_TYPES
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.unit.quantize_tensors import map_digest
from tests.unit.type_map_models import MODELS

MATRIX = {
    "general.type": "imatrix",
    "imatrix.datasets": ["none"],
    "imatrix.chunk_count": 1,
    "imatrix.chunk_size": 512,
}


def main(program: str) -> None:
    found: dict[str, dict[str, list[str]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        source, matrix, out = (Path(folder) / n for n in ("f32.gguf", "imatrix.gguf", "out.gguf"))
        ones = np.ones((1, 256), np.float32)
        entry = [("none.in_sum2", encode_dense(ones)), ("none.counts", encode_dense(ones[:, :1]))]
        write_gguf(matrix, MATRIX, entry)
        for name, model in MODELS.items():
            tensors = [
                (n, encode_dense(np.ones(s.shape, "f4"))) for n, s in model.tensors().items()
            ]
            write_gguf(source, model.metadata(), tensors)
            found[name] = {}
            for file_type in FILE_TYPES:
                found[name][file_type] = []
                for options in ([], ["--imatrix", str(matrix)]):
                    command = [program, *options, str(source), str(out), file_type]
                    subprocess.run(command, check=True, capture_output=True)
                    with GGUFFile.open(out) as file:
                        formats = {n: t.format for n, t in file.tensors.items()}
                    found[name][file_type].append(map_digest(formats))
    path = Path(__file__).with_name("type_maps.json")
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main(sys.argv[1])
