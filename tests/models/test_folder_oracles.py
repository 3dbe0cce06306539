"""Folders that are written, loaded by transformers with compressed-tensors: its logits are ours.

The layouts of GPTQ and AWQ are held to bytes that AutoGPTQ and AutoAWQ wrote
(`test_written_folders.py`); transformers loads these layouts only with libraries that need a GPU's
toolchain to install.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .convert import convert
from .harness import GOLDEN, Session, check_close, load
from .test_written_folders import QUANTIZED, windows, write

torch = pytest.importorskip("torch", reason="torch is not installed; transformers needs it")
transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed; it loads what is written"
)
pytest.importorskip(
    "compressed_tensors",
    reason="compressed-tensors is not installed; transformers reads such folders with it",
)

torch.set_num_threads(1)
IDS = np.arange(3, 43, dtype=np.int32)
# The library divides the largest activation of a token by 127.5, we by 127; and both round it.
W8A8_BUDGET = 0.1
# torch warns of features of its own that the library uses
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def their_logits(path: Path) -> np.ndarray:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(IDS[None].astype(np.int64))).logits
    found: np.ndarray = logits[0].float().numpy()
    return found


@pytest.mark.parametrize("kind", ["w4a16-g64", "w4a16-g-1", "w8a16", "int8", "w8a8"])
def test_transformers_computes_our_logits(kind: str, tmp_path: Path) -> None:
    """With groups of 64, some matrices have groups of 32."""
    source = QUANTIZED / "gptq-int4-g32"
    write(source, tmp_path / "out", kind, text=windows(source), requantize=True)
    ours = Session(load(tmp_path / "out", "reference")).prefill(IDS)
    budget = {"budget": W8A8_BUDGET} if kind == "w8a8" else {}
    check_close(ours, their_logits(tmp_path / "out"), **budget)


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3-longrope", "mistral", "llama3"]
)
def test_transformers_computes_our_logits_of_what_was_a_gguf_file(
    name: str, tmp_path: Path
) -> None:
    """Its config.json is made; so are biases, norms of 1 + w and fused matrices."""
    convert(GOLDEN / name, tmp_path / "model.gguf")
    write(tmp_path / "model.gguf", tmp_path / "out", "w4a16-g32", calibrated=False)
    ours = Session(load(tmp_path / "out", "reference")).prefill(IDS)
    check_close(ours, their_logits(tmp_path / "out"))
