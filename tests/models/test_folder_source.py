"""Folders of every family as GGUF files: what llama.cpp's converter writes, and the same model."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from pellucid.engine_config import EngineConfig
from pellucid.errors import ConfigError, FormatError, UnsupportedError
from pellucid.formats import dequantize, quantize
from pellucid.measure.evaluation import open_evaluation
from pellucid.measure.perplexity import PROTOCOLS, Perplexity
from pellucid.quant.quantize import plan_quantization, write_quantized
from pellucid.quant.source import open_source
from pellucid.quant.type_map import find_file_type
from pellucid.tokenizer import load_tokenizer
from pellucid.tokenizer.pretokenizers import PROBE
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.gguf import GGUFFile

from .folders import FOLDERS, TEXT, write_folder
from .harness import GOLDEN

CONVERTED = json.loads(
    (Path(__file__).parents[1] / "golden" / "convert" / "golden.json").read_text()
)
# What differs from the converter, and why:
LEFT_OUT = {
    *("general.file_type", "general.quantization_version"),  # written with the file
    *("general.name", "general.size_label"),  # texts for people
    "tokenizer.ggml.add_sep_token",  # of pairs of texts
    # 4096, transformers' default for any context, also where no factors depend on it
    "phi3.rope.scaling.original_context_length",
}
# transformers adds a token to Qwen's tokenizers; the converter has no scores for pieces, and so
# makes another tokenizer of Mistral's
OTHER_TOKENS = ("qwen2", "mistral")


def quantized(folder: Path, file_type: str = "f32") -> Path:
    out = folder.with_suffix(f".{file_type}.gguf")
    with open_source(folder) as source:
        plan = plan_quantization(source, find_file_type(file_type))
        assert len(list(write_quantized(source, out, plan))) == len(plan.after)
    return out


@pytest.mark.parametrize("name", FOLDERS)
def test_keys_and_tensors_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    golden = CONVERTED[name]
    with open_source(write_folder(tmp_path / name, name)) as source:
        for key, value in golden["metadata"].items():
            if key in LEFT_OUT or (name in OTHER_TOKENS and isinstance(value, list)):
                continue
            expected = pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            assert source.metadata[key] == expected, key
        assert set(source.specs) == set(golden["tensors"])
        for tensor, (shape, digest) in golden["tensors"].items():
            made = source.tensor(tensor)
            if tensor == "rope_freqs.weight":  # computed there in float32
                assert list(made.shape) == shape
                continue
            rows = shape[0]  # Gemma's converter drops rows without a token
            assert list(made.shape[1:]) == shape[1:] and made.shape[0] >= rows
            data = made.data[:rows] if len(shape) > 1 else made.data
            assert hashlib.sha256(data.tobytes()).hexdigest() == digest, tensor


@pytest.mark.parametrize("name", FOLDERS)
def test_the_file_is_the_same_model(name: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / name, name)
    with open_checkpoint(folder) as ours, open_checkpoint(quantized(folder)) as written:
        found = dict(written.parameters())
        for parameter, tensor in ours.parameters():
            assert np.array_equal(dequantize(found[parameter]), dequantize(tensor)), parameter
        before, after = (load_tokenizer(c.tokenizer_source) for c in (ours, written))
    for text in (PROBE, TEXT, "<s>hello</s> world<|im_end|><tool>"):
        assert after.encode(text, parse_special=True) == before.encode(text, parse_special=True)
    # readers of GGUF files know more ends by their names
    assert after.eos_token_ids >= before.eos_token_ids
    assert after.chat_template == before.chat_template


@pytest.mark.parametrize("name", FOLDERS)
def test_llama_cpp_predicts_text_by_the_file_as_pellucid_does(name: str, tmp_path: Path) -> None:
    if name in ("mistral", "phi3", "llama-yarn"):
        pytest.skip("llama.cpp has no windows in these, and computes yarn in another way")
    path = quantized(write_folder(tmp_path / name, name), "q8_0")
    config = EngineConfig(backend="reference", block_size=16)
    protocol = PROTOCOLS["llama.cpp"]
    with open_evaluation(path, config, TEXT, protocol, n_ctx=64, chunks=10) as evaluation:
        *_, result = evaluation.run()
    assert isinstance(result, Perplexity)
    # activations are rounded to eight bits there
    assert result.perplexity == pytest.approx(CONVERTED[name]["perplexity"], rel=0.01)


@pytest.mark.parametrize(("dtype", "format"), [("float16", "F16"), ("float32", "F32")])
def test_matrices_keep_their_format_until_they_are_quantized(
    dtype: str, format: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / "qwen2", "qwen2", dtype)
    with open_source(folder) as source:
        assert source.specs["blk.0.attn_q.weight"].format == format
        assert source.specs["blk.0.attn_q.bias"].format == "F32"
        plan = plan_quantization(source, find_file_type("q8_0"))
    assert plan.after["blk.0.attn_q.weight"].format == "Q8_0"


def test_bfloat16_weights_are_encoded_as_they_are(tmp_path: Path) -> None:
    """Not through float16, which holds fewer of them."""
    folder = write_folder(tmp_path / "llama", "llama")
    header: dict[str, Any] = {}
    data = b""
    for name, array in load_file(folder / "model.safetensors").items():
        halves = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        span = [len(data), len(data) + len(halves)]
        header[name] = {"dtype": "BF16", "shape": list(array.shape), "data_offsets": span}
        data += halves
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    with open_source(folder) as source:
        assert source.specs["blk.0.ffn_up.weight"].format == "BF16"
        assert source.specs["blk.0.ffn_norm.weight"].format == "F32"
        exact = dequantize(source.tensor("blk.0.ffn_up.weight"))
    with GGUFFile.open(quantized(folder, "q8_0")) as file:
        made = file.tensor("blk.0.ffn_up.weight")
    assert np.array_equal(made.data, quantize(exact, "Q8_0").data)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "windows, (None, 8)"),
        ("gemma2", {"query_pre_attn_scalar": 24}, "scale of scores, 0.204"),
        ("llama", {"hidden_act": "gelu_new"}, "activation, 'gelu_tanh'"),
    ],
)
def test_what_a_gguf_file_cannot_hold_is_refused_by_its_name(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path / name, name, **changes)
    with pytest.raises(UnsupportedError, match="cannot hold its") as error:
        open_source(folder)
    assert message in str(error.value)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        open_source(folder)


def test_words_that_gguf_files_have_no_name_for_are_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "llama")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "WhitespaceSplit"})
    path.write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match="in a way for which GGUF files have no name"):
        open_source(folder)


def test_pieces_that_are_not_merged_as_sentencepiece_does_are_refused(tmp_path: Path) -> None:
    """Scores cannot say that "the" is made of "th" and "e", and not of "t" and "he"."""
    folder = write_folder(tmp_path / "gemma2", "gemma2")
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"] = [m for m in values["model"]["merges"] if list(m) != ["t", "he"]]
    path.write_text(json.dumps(values))
    with pytest.raises(UnsupportedError, match="cannot describe this tokenizer"):
        open_source(folder)


def test_rows_without_a_token_get_one_and_tokens_without_a_row_are_left_out(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "qwen2", "qwen2")
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    with GGUFFile.open(quantized(folder)) as file:
        texts = file.metadata["tokenizer.ggml.tokens"]
    assert isinstance(texts, list) and len(texts) == 384
    assert texts[-1] == "[PAD383]" and tokens[-1]["content"] in texts


def test_a_packed_folder_is_quantized_only_if_that_is_allowed(tmp_path: Path) -> None:
    # a vocabulary of pieces without bytes, so that it fits 96 rows
    folder = write_folder(tmp_path / "llama", "gemma2")
    values = json.loads((folder / "tokenizer.json").read_text())
    pieces = sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)
    kept = [piece for piece in pieces if not piece.startswith("<0x")]
    values["model"] |= {"vocab": {text: i for i, text in enumerate(kept)}, "byte_fallback": False}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    (folder / "model.safetensors").unlink()
    for file in (GOLDEN.parent / "quantized" / "gptq-int4-g32-actorder").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    with open_source(folder) as source:
        with pytest.raises(ConfigError, match="is quantized already"):
            plan_quantization(source, find_file_type("q8_0"))
        plan = plan_quantization(source, find_file_type("f32"), allow_requantize=True)
        list(write_quantized(source, tmp_path / "out.gguf", plan))
    # the order of inputs is undone
    with open_checkpoint(folder) as ours, open_checkpoint(tmp_path / "out.gguf") as made:
        found = dict(made.parameters())
        permuted = 0
        for parameter, tensor in ours.parameters():
            permuted += tensor.input_order is not None
            assert np.array_equal(dequantize(found[parameter]), dequantize(tensor)), parameter
    assert permuted
