"""Folders that are written, loaded by transformers with compressed-tensors: its logits are ours.

The layouts of GPTQ and AWQ are held to bytes that AutoGPTQ and AutoAWQ wrote
(`test_written_folders.py`); transformers loads these layouts only with libraries that need a GPU's
toolchain to install.
"""

import re
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
# torch warns of features of its own that the library uses
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]


def their_model(path: Path) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.eval()


def their_logits(path: Path) -> np.ndarray:
    return logits_of(their_model(path))


def logits_of(model: Any) -> np.ndarray:
    with torch.no_grad():
        logits = model(torch.from_numpy(IDS[None].astype(np.int64))).logits
    found: np.ndarray = logits[0].float().numpy()
    return found


@pytest.mark.parametrize("kind", ["w4a16-g64", "w4a16-g-1", "w8a16", "int8"])
def test_transformers_computes_our_logits(kind: str, tmp_path: Path) -> None:
    """With groups of 64, some matrices have groups of 32."""
    source = QUANTIZED / "gptq-int4-g32"
    write(source, tmp_path / "out", kind, text=windows(source), requantize=True)
    ours = Session(load(tmp_path / "out", "reference")).prefill(IDS)
    check_close(ours, their_logits(tmp_path / "out"))


def test_transformers_rounds_the_activations_of_our_products(tmp_path: Path) -> None:
    """Without rounding of activations its logits are ours. With it, each product of a layer is that
    of our weight and the rounded input.

    Logits with rounding differ by some per cent for a reason of the library's: a token's largest
    value lies at 127.5, in the middle between two codes, and the last bit of a sum decides.
    """
    source = QUANTIZED / "gptq-int4-g32"
    write(source, tmp_path / "out", "w8a8", text=windows(source), requantize=True)
    model, loaded = their_model(tmp_path / "out"), load(tmp_path / "out", "reference")
    modules = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for module in modules.values():
        module.quantization_enabled = False
    check_close(Session(loaded).prefill(IDS), logits_of(model))
    # the products, from the library's own inputs
    seen: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, module in modules.items():
        module.quantization_enabled = True
        module.register_forward_hook(
            lambda _, x, y, name=name: seen.update({name: (x[0][0].numpy(), y[0].numpy())})
        )
    logits_of(model)
    weights = {name.removesuffix(".weight"): w for name, w in loaded.weights.items()}
    assert len(seen) == 7 * loaded.config.num_layers + 1
    for name, (x, y) in seen.items():
        if name != "lm_head":
            own = re.sub(r"^model\.|self_attn\.|mlp\.", "", name)
            check_close(their_rounding(x) @ weights[own].T, y)


def their_rounding(x: np.ndarray) -> np.ndarray:
    """Activations [T, n] as compressed-tensors rounds them: a step is the largest absolute value
    over half of 255, and codes are -128 … 127. We divide the largest value by 127, as vLLM
    does.
    """
    step = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127.5)
    found: np.ndarray = np.clip(np.rint(x / step), -128, 127) * step
    return found


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
