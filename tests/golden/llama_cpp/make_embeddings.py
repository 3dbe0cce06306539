"""Embeddings by llama.cpp, as a golden file: what tests/real/test_embeddings_llama_cpp.py holds the
engine to.

    python make_embeddings.py <llama-embedding> <folder with the .gguf files>

For each model and each pooling it stores what `llama-embedding --pooling P -p TEXT` prints: vectors
of length 1, with seven digits behind the point. `made_by` is the version that the program names.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

TEXT = (
    "The prefill of a prompt is bound by arithmetic, and the decode of its answer by memory. "
    "An embedding has no answer: it is prefill alone."
)
MODELS = [
    "smollm2-135m-instruct-q4_1.gguf",
    "gemma-3-270m-q4_k_m.gguf",
    "qwen2.5-coder-0.5b-q4.gguf",
]


def embed(program: str, model: Path, pooling: str) -> list[float]:
    command = [program, "-m", str(model), "--pooling", pooling, "-p", TEXT]
    options = ["--embd-normalize", "2", "--embd-output-format", "array", "--no-warmup"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    (vector,) = json.loads(done.stdout)
    return list(vector)


def main(program: str, models: Path) -> None:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    version = re.search(r"version: .*", said.stdout + said.stderr)
    assert version is not None
    golden = {
        "made_by": f"llama-embedding, {version[0]}",
        "text": TEXT,
        "embeddings": {
            name: {pooling: embed(program, models / name, pooling) for pooling in ("last", "mean")}
            for name in MODELS
        },
    }
    path = Path(__file__).with_name("embeddings.json")
    path.write_text(re.sub(r",\s+(?=-?\d)", ", ", json.dumps(golden, indent=1)) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
