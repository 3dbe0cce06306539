"""Makes the golden files beside it: what llama.cpp's converter writes for the folders of
tests/models/folders.py, as metadata and SHA-256 of each tensor, and llama.cpp's perplexity on them.

    python tests/golden/convert/make_golden.py LLAMA_CPP BINARIES

LLAMA_CPP is a source tree of llama.cpp (made with the one in the sdist of llama-cpp-python 0.3.36),
BINARIES the folder of its llama-perplexity. Needs torch, transformers and sentencepiece.
Vocabularies get the pre-tokenizer's name that Pellucid finds: the converter knows names by the hash
of a whole vocabulary, and these vocabularies have none. The converter reads SentencePiece
vocabularies from a file that these folders do not have, so the keys of such tokenizers are left
out.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))

from pellucid.quant.quantize import plan_quantization, write_quantized
from pellucid.quant.source import open_source
from pellucid.quant.type_map import find_file_type
from tests.models.folders import FOLDERS, TEXT, write_folder

HERE = Path(__file__).parent


def convert(source: Path, folder: Path, out: Path) -> dict[str, Any]:
    """Run llama.cpp's converter on a folder."""
    for place in (source / "gguf-py", source):
        if str(place) not in sys.path:
            sys.path.insert(0, str(place))
    import conversion
    import gguf
    from conversion.base import ModelBase, TextModel

    conversion.load_all_models()
    with open_source(folder) as ours:
        pre = ours.metadata["tokenizer.ggml.pre"]
        pieces = ours.metadata["tokenizer.ggml.model"] == "llama"
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    values = ModelBase.load_hparams(folder, False)
    family = ModelBase.from_model_architecture(values["architectures"][0])
    if pieces:
        family.set_vocab = lambda self: None
    family(folder, gguf.LlamaFileType.ALL_F32, out).write()
    reader = gguf.GGUFReader(out)
    return {
        "metadata": {
            key: field.contents()
            for key, field in reader.fields.items()
            if not key.startswith("GGUF.")
        },
        "tensors": {
            tensor.name: [
                tensor.shape[::-1].tolist(),
                hashlib.sha256(np.array(tensor.data).tobytes()).hexdigest(),
            ]
            for tensor in reader.tensors
        },
    }


def perplexity(binaries: Path, folder: Path, scratch: Path) -> float:
    """llama.cpp's perplexity on our Q8_0 of a folder."""
    model, text = scratch / "ours.gguf", scratch / "text.txt"
    text.write_text(TEXT)
    with open_source(folder) as source:
        list(write_quantized(source, model, plan_quantization(source, find_file_type("q8_0"))))
    float32 = ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]
    program, size = str(binaries / "llama-perplexity"), ["-c", "64", "--chunks", "10"]
    for _ in range(10):  # its last line is lost now and then
        done = subprocess.run(
            [program, "-m", model, "-f", text, *size, *float32],
            capture_output=True,
            text=True,
            check=True,
            env={"LD_LIBRARY_PATH": str(binaries)},
        )
        found = re.search(r"Final estimate: PPL = ([\d.]+)", done.stdout + done.stderr)
        if found:
            return float(found[1])
    raise SystemExit(done.stderr)


def main() -> None:
    source, binaries = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for name in FOLDERS:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_folder(Path(scratch) / name, name)
            found[name] = convert(source, folder, Path(scratch) / "theirs.gguf")
            found[name]["perplexity"] = perplexity(binaries, folder, Path(scratch))
    (HERE / "golden.json").write_text(json.dumps(found, indent=0, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
