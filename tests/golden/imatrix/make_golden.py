"""Makes the importance matrices beside this script with llama.cpp's llama-imatrix (0.3.36 of
llama-cpp-python's source): of the tests' tiny model, whose text has a beginning-of-sequence token
in `bos.gguf` and none in `plain.gguf`.

    python -m tests.golden.imatrix.make_golden PATH/TO/llama-imatrix
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.engine.conftest import write_tiny

HERE = Path(__file__).parent
N_CTX = 32

if __name__ == "__main__":
    for name, add_bos in (("plain", False), ("bos", True)):
        with tempfile.TemporaryDirectory() as folder:
            model = write_tiny(Path(folder) / "tiny.gguf", add_bos=add_bos)
            options = f"-c {N_CTX} -b {N_CTX} -t 1 -ctk f32 -ctv f32 -fa off --no-ppl"
            files = f"-m {model} -f text.txt -o {name}.gguf"
            command = [sys.argv[1], *files.split(), *options.split()]
            subprocess.run(command, cwd=HERE, check=True)
