"""`quantization=` while a model is loaded: the bytes that `pellucid quantize` writes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pellucid import LLM, SamplingParams
from pellucid.engine_config import EngineConfig
from pellucid.errors import CapacityError, ConfigError, FormatError
from pellucid.quant.at_load import quantize_at_load
from pellucid.quant.folder_model import FolderModel
from pellucid.quant.folder_types import find_folder_type
from pellucid.quant.quantize import plan_quantization, write_quantized
from pellucid.quant.source import open_source
from pellucid.quant.type_map import FILE_TYPES, find_file_type
from pellucid.quant.writers import plan_folder
from pellucid.quant.writers import write_folder as write_packed
from pellucid.weights.checkpoint import open_checkpoint

from .folders import write_folder
from .harness import GOLDEN

WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
GREEDY = SamplingParams(max_tokens=6, temperature=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


@pytest.mark.parametrize("file_type", FILE_TYPES)
@pytest.mark.parametrize("name", ["llama", "phi3"])  # with moved rows, with fused matrices
def test_matrices_are_those_of_a_written_file(name: str, file_type: str, folders: Path) -> None:
    folder, out = folders / name, folders / f"{name}.gguf"
    if not folder.exists():
        wide = {key: size for key, size in WIDE.items() if name == "llama" or key != "head_dim"}
        write_folder(folder, name, "float32", **wide)
    with open_source(folder) as source:
        list(write_quantized(source, out, plan_quantization(source, find_file_type(file_type))))
    with open_checkpoint(folder) as checkpoint, open_checkpoint(out) as written:
        loaded = quantize_at_load(checkpoint, file_type.upper())
        expected, specs = dict(written.parameters()), loaded.specs()
        for parameter, tensor in loaded.parameters():
            assert specs[parameter] == tensor.spec == expected[parameter].spec
            assert np.array_equal(tensor.data, expected[parameter].data), parameter


@pytest.mark.parametrize("kind", ["int8", "w8a8"])
def test_rows_in_int8_are_those_of_a_written_folder(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "qwen2", "qwen2", "float32", **WIDE)
    found = find_folder_type(kind)
    assert found is not None
    with open_checkpoint(folder) as checkpoint:
        model = FolderModel(checkpoint)
        plan = plan_folder(model, found.layout)
        list(write_packed(model, tmp_path / "out", plan, found.quantize(model, plan, None)))
        with open_checkpoint(tmp_path / "out") as written:
            expected = dict(written.parameters())
        changed = 0
        for parameter, tensor in quantize_at_load(checkpoint, kind).parameters():
            changed += tensor.format.startswith("INT8")
            assert tensor.spec == expected[parameter].spec
            assert np.array_equal(tensor.data, expected[parameter].data), parameter
        assert changed == 2 * 7


def test_an_engine_answers_as_with_the_written_file(tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "llama", "llama", **WIDE), tmp_path / "out.gguf"
    with open_source(folder) as source:
        list(write_quantized(source, out, plan_quantization(source, find_file_type("q4_k_m"))))
    answers = [
        llm.generate(["hello world"], GREEDY)[0].outputs[0].token_ids
        for llm in (
            LLM(str(folder), quantization="q4_k_m", max_model_len=64),
            LLM(str(out), max_model_len=64),
        )
    ]
    assert answers[0] == answers[1]


def test_the_plan_of_memory_counts_the_quantized_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With memory for a Q4_0 and not for the floats, the model loads."""
    sizes: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = write_folder(tmp_path / "llama", "llama", "float32", **sizes, head_dim=256)
    available = 40 << 20  # the floats take 100 MiB, and Q4_0 14
    monkeypatch.setattr(
        "pellucid.backends.native.backend.NativeBackend.available_memory", lambda self: available
    )
    options: dict[str, Any] = {"max_model_len": 32, "max_num_batched_tokens": 32, "max_num_seqs": 1}
    with pytest.raises(CapacityError, match="weights"):
        LLM(str(folder), **options)
    assert LLM(str(folder), quantization="q4_0", **options).generate(["hello"], GREEDY)


@pytest.mark.parametrize("name", ["q4_k_mm", "int4", "gptq-int4-g128", ""])
def test_unknown_names_are_refused_with_those_that_there_are(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama")
    with pytest.raises(ConfigError, match="quantization"):
        LLM(str(folder), quantization=name)


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path) -> None:
    packed = GOLDEN.parent / "quantized" / "gptq-int4-g32"
    with open_checkpoint(packed) as checkpoint:
        with pytest.raises(ConfigError, match=r"is quantized already: layers\.0"):
            quantize_at_load(checkpoint, "q8_0")
        # vLLM's names are accepted where they agree with the files
        assert quantize_at_load(checkpoint, "gptq") is checkpoint
        with pytest.raises(ConfigError, match=r"'awq'; .* is quantized by 'gptq'"):
            quantize_at_load(checkpoint, "awq")
    plain = open_checkpoint(GOLDEN / "llama")
    with plain, pytest.raises(ConfigError, match="is not quantized"):
        quantize_at_load(plain, "compressed-tensors")


@pytest.mark.parametrize("kind", ["q8_0", "int8"])
def test_a_weight_that_is_no_number_is_refused(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "qwen2", "qwen2", **WIDE)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    with open_checkpoint(folder) as checkpoint:
        loaded = quantize_at_load(checkpoint, kind)
        with pytest.raises(FormatError, match=r"layers\.1\.up_proj\.weight"):
            list(loaded.parameters())


def test_rows_of_which_no_format_holds_the_width_stay_floats(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_folder(tmp_path / "qwen2", "qwen2")  # 48 is no multiple of 32
    with open_checkpoint(folder) as checkpoint:
        specs = quantize_at_load(checkpoint, "int8").specs()
    assert specs["layers.0.down_proj.weight"].format == "F32"
    assert specs["layers.0.up_proj.weight"].format == "INT8_G32"
    assert "layers.0.down_proj.weight keeps its format" in caplog.text


def test_the_option_is_an_engine_option() -> None:
    assert EngineConfig(quantization="int8").quantization == "int8"
