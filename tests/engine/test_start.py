"""A start: it imports no library that the model at hand does not need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Whatever only an error, a download, a folder, a chat or the second tier of the cache needs.
UNNEEDED = (
    "asyncio bz2 concurrent.futures difflib hashlib huggingface_hub jinja2 multiprocessing "
    "prompt_toolkit shutil socket subprocess tempfile tqdm zipfile "
    "pellucid.tokenizer.from_folder pellucid.weights.safetensors_checkpoint pellucid.weights.wheels"
)
SCRIPT = f"""
import sys
import numpy, tokenizers
theirs = set(sys.modules)
from pellucid import LLM
with LLM(sys.argv[1]):
    print(sorted((set("{UNNEEDED}".split()) & set(sys.modules)) - theirs))
"""


def test_loading_a_gguf_file_imports_nothing_that_it_does_not_need(tiny_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tiny_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


BLAS = """
import os, sys
found = []

def note(event, arguments):
    if event == "import" and arguments[0] == "numpy":
        found.append(os.environ.get("OPENBLAS_NUM_THREADS"))

sys.addaudithook(note)
from pellucid.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print(found[0], file=sys.stderr)
"""


@pytest.mark.parametrize(("backend", "threads"), [("native", "1"), ("reference", "None")])
def test_a_command_of_the_native_backend_lets_blas_start_no_threads(
    tiny_path: Path, backend: str, threads: str
) -> None:
    """They spin while NumPy is imported, on the core that the template's process starts on."""
    environment = {k: v for k, v in os.environ.items() if k != "OPENBLAS_NUM_THREADS"}
    command = ["run", "hi", "-q", "-n", "1", "-m", str(tiny_path), "--backend", backend]
    done = subprocess.run(
        [sys.executable, "-c", BLAS, *command],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == f"{threads}\n"
