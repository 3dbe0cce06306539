"""A start: it imports no library that the model at hand does not need."""

import subprocess
import sys
from pathlib import Path

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
