"""`pellucid quantize`: what it writes, what it says, what it refuses, and what is left behind."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.cli.main import main
from pellucid.errors import ConfigError, FormatError
from pellucid.formats import HostTensor, dequantize, encode_dense, quantize
from pellucid.quant.quantize import plan_quantization, write_quantized
from pellucid.quant.source import open_source
from pellucid.quant.type_map import find_file_type
from pellucid.weights import gguf_writer
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

GOLDEN = Path(__file__).parents[1] / "golden"
HIDDEN, FFN, VOCAB, LAYERS = 256, 512, 40, 2
MATRICES = {
    "attn_q": (256, 256),
    "attn_k": (64, 256),
    "attn_v": (64, 256),
    "attn_output": (256, 256),
    "ffn_gate": (512, 256),
    "ffn_up": (512, 256),
    "ffn_down": (256, 512),
}
METADATA = {
    "general.architecture": "llama",
    "general.name": "Tiny",
    "general.file_type": 1,
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.block_count": LAYERS,
    "llama.feed_forward_length": FFN,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


def tensors(format: str = "F16") -> dict[str, HostTensor]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in MATRICES.items()}
    found = {
        f"{name}.weight": quantize(rng.normal(size=shape).astype(np.float32), format)
        for name, shape in shapes.items()
    }
    ones = encode_dense(np.ones(HIDDEN, np.float32))
    norms = [f"blk.{i}.{name}_norm" for i in range(LAYERS) for name in ("attn", "ffn")]
    return found | {f"{name}.weight": ones for name in ("output_norm", *norms)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    write_gguf(path, METADATA, tensors().items())
    return path


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, ["quantize", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_types_and_the_reports_figures(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    report = json.loads(run(model, out, "--to", "q4_k_m", "--json").stdout)
    originals = tensors()
    with GGUFFile.open(out) as file:
        assert file.metadata["general.file_type"] == 15
        assert file.metadata["general.quantization_version"] == 2
        assert file.metadata["general.name"] == "Tiny"
        assert [row["name"] for row in report["tensors"]] == list(file.tensors)
        for row in report["tensors"]:
            tensor, values = file.tensor(row["name"]), dequantize(originals[row["name"]])
            assert (row["to"], row["bytes"]) == (tensor.format, tensor.data.nbytes)
            lost = dequantize(tensor) - values
            if row["from"] == row["to"]:
                assert row["relative_error"] is None and not lost.any()
            else:
                expected = np.sqrt((lost**2).sum() / (values**2).sum())
                assert row["relative_error"] == pytest.approx(expected, rel=1e-3)
        formats = {name: t.format for name, t in file.tensors.items()}
    assert formats["token_embd.weight"] == formats["blk.1.ffn_down.weight"] == "Q6_K"
    assert formats["blk.0.attn_q.weight"] == "Q4_K"
    assert formats["output_norm.weight"] == "F32"
    assert report["file_bytes"] == out.stat().st_size
    assert left_in(tmp_path) == ["model.gguf", "out.gguf"]


def test_people_see_an_estimate_and_a_table(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out.gguf", "--to", "Q8_0")
    assert "of weights become" in result.stderr and "as q8_0, 8.5" in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["tensor", "from", "to", "size", "error"]
    assert any(line.split()[:3] == ["blk.1.attn_q.weight", "F16", "Q8_0"] for line in lines)
    assert lines[-1] == "tensors: 15 Q8_0, 5 F32"


def test_formats_of_a_type_map_precede_the_types(model: Path, tmp_path: Path) -> None:
    (tmp_path / "map").write_text("attn_q=q5_k token_embd=f16")
    out = tmp_path / "out.gguf"
    run(model, out, "--to", "q4_0", "--type-map", tmp_path / "map")
    with GGUFFile.open(out) as file:
        assert file.tensors["blk.1.attn_q.weight"].format == "Q5_K"
        assert file.tensors["token_embd.weight"].format == "F16"
        assert file.tensors["blk.1.attn_k.weight"].format == "Q4_0"


def test_importance_and_an_encoder_of_ones_own_reach_the_tensors(
    model: Path, tmp_path: Path
) -> None:
    name, out = "blk.0.attn_q.weight", tmp_path / "out.gguf"
    importance = {name: np.arange(HIDDEN, dtype=np.float32)}
    seen = []

    def encode(name: str, values: np.ndarray, format: str, given: np.ndarray | None) -> HostTensor:
        seen.append((name, values.shape, format, given is not None))
        return quantize(np.zeros_like(values), format)

    with open_source(model) as source:
        plan = plan_quantization(source, find_file_type("q4_k_s"), importance=importance)
        for given in (None, encode):
            reports = list(write_quantized(source, out, plan, importance=importance, encode=given))
            assert [r.name for r in reports if r.weighted] == [name]
            if given is None:
                with GGUFFile.open(out) as file:
                    expected = quantize(dequantize(tensors()[name]), "Q4_K", importance[name])
                    np.testing.assert_array_equal(file.tensor(name).data, expected.data)
    assert (name, (256, 256), "Q4_K", True) in seen
    assert all(r.error == pytest.approx(1) for r in reports if r.error is not None)


def test_an_importance_matrix_of_a_file_is_used_and_named(model: Path, tmp_path: Path) -> None:
    name, out = "blk.0.attn_q.weight", tmp_path / "out.gguf"
    importance = np.arange(HIDDEN, dtype=np.float32)
    write_gguf(
        tmp_path / "imatrix.gguf",
        {
            "general.type": "imatrix",
            "imatrix.datasets": ["my text"],
            "imatrix.chunk_count": 3,
            "imatrix.chunk_size": 512,
        },
        [
            (f"{name}.in_sum2", encode_dense(2 * importance[None])),
            (f"{name}.counts", encode_dense(np.full((1, 1), 2, np.float32))),
        ],
    )
    run(model, out, "--to", "q4_k_s", "--imatrix", tmp_path / "imatrix.gguf")
    with GGUFFile.open(out) as file:
        expected = quantize(dequantize(tensors()[name]), "Q4_K", importance)
        np.testing.assert_array_equal(file.tensor(name).data, expected.data)
        assert file.metadata["quantize.imatrix.dataset"] == "my text"
        assert file.metadata["quantize.imatrix.entries_count"] == 1
        assert file.metadata["quantize.imatrix.chunks_count"] == 3
    result = run(model, out, "--to", "q4_k_s", "--imatrix", model, code=1)
    assert "is no importance matrix" in result.stderr


def test_another_models_importance_is_refused(model: Path) -> None:
    wanted = find_file_type("q4_k_s")
    with open_source(model) as source:
        for importance, message in (
            ({"x.weight": np.ones(3, np.float32)}, "has no tensor of .* 'x.weight'"),
            ({"blk.0.attn_q.weight": np.ones(3, np.float32)}, "has 3 values for tensor 'blk.0"),
            ({"blk.0.attn_q.weight": np.full(256, np.nan, np.float32)}, "non-finite"),
        ):
            with pytest.raises(ConfigError, match=message):
                plan_quantization(source, wanted, importance=importance)


def test_a_quantized_model_needs_permission(tmp_path: Path) -> None:
    path, out = tmp_path / "q8.gguf", tmp_path / "out.gguf"
    write_gguf(path, METADATA, tensors("Q8_0").items())
    result = run(path, out, "--to", "q4_0", code=1)
    assert "is quantized already: tensor 'token_embd.weight' is Q8_0 and would" in result.stderr
    assert "--allow-requantize permits it" in result.stderr
    assert left_in(tmp_path) == ["q8.gguf"]
    run(path, out, "--to", "q4_0", "--allow-requantize")
    run(path, out, "--to", "q8_0")  # nothing changes


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("to", ["q4_k_m", "q8_0", "f16", "f32"])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, bad: float, to: str) -> None:
    values = np.zeros((64, 256), np.float32)
    values[3, 7] = bad
    path = tmp_path / "bad.gguf"
    changed = tensors("F32") | {"blk.1.attn_k.weight": encode_dense(values)}
    write_gguf(path, METADATA, changed.items())
    result = run(path, tmp_path / "out.gguf", "--to", to, code=1)
    assert "tensor 'blk.1.attn_k.weight' holds NaN or infinity" in result.stderr
    assert left_in(tmp_path) == ["bad.gguf"]


def test_a_value_that_a_format_cannot_hold_is_named(tmp_path: Path) -> None:
    path = tmp_path / "large.gguf"
    large = encode_dense(np.full((64, 256), 1e9, np.float32))
    write_gguf(path, METADATA, (tensors("F32") | {"blk.1.attn_k.weight": large}).items())
    for to, said in (("f16", "F16 cannot hold the value 1e+09"), ("q4_0", "Q4_0 cannot hold")):
        result = run(path, tmp_path / "out.gguf", "--to", to, code=1)
        assert f"tensor 'blk.1.attn_k.weight' becomes {to.upper()}: {said}" in result.stderr


def test_wrong_places_and_names_are_one_sentence(model: Path, tmp_path: Path) -> None:
    for out, said in (
        (model, "which is read; give another name"),
        (tmp_path, "which is a folder; give the name of a file"),
        (tmp_path / "none" / "out.gguf", "there is no folder"),
    ):
        result = run(model, out, "--to", "q4_0", code=1)
        assert said in result.stderr and result.stderr.count("\n") <= 3
    result = run(model, tmp_path / "o.gguf", "--to", "q4_kk", code=1)
    assert "q2_k, int2, gptq" in result.stderr
    assert "type is 'q4_kk' (did you mean q4_k?)" in result.stderr or "q4_k_" in result.stderr
    assert left_in(tmp_path) == ["model.gguf"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--to", "q4_0", "--calibration-chunks", "3"], "is 3, and there is no --calibration"),
        (["--to", "int8", "--calibration-chunks", "3"], "is 3, and there is no --calibration"),
        (["--to", "q4_0", "--method", "rtn", "--imatrix", "x"], "--imatrix is given, and --method"),
        (["--to", "q4_0", "--method", "rtn", "--calibration", "x"], "--calibration is given, and"),
        (["--to", "f16", "--calibration", "x"], "F16 is not quantized, and makes no use of a"),
        (["--to", "bf16", "--imatrix", "x"], "BF16 is not quantized, and makes no use of a"),
    ],
)
def test_an_option_without_use_is_refused(
    model: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    result = run(model, tmp_path / "out.gguf", *options, code=1)
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_rules_that_decide_for_no_tensor_are_named(model: Path, tmp_path: Path) -> None:
    """Their pattern is found in no name, only behind another rule, or in tensors that stay."""
    (tmp_path / "map").write_text("attn_=q5_k\nattn_q=q4_k\nattnq=q8_0\nnorm=f16\n")
    result = run(model, tmp_path / "out.gguf", "--to", "q4_0", "--type-map", tmp_path / "map")
    said = [line for line in result.stderr.splitlines() if "decides for no tensor" in line]
    assert [line.split()[-5] for line in said] == ["attn_q=Q4_K", "attnq=Q8_0", "norm=F16"]
    (tmp_path / "map").write_text("# nothing\n")
    result = run(
        model, tmp_path / "out.gguf", "--to", "q4_0", "--type-map", tmp_path / "map", code=1
    )
    assert "map has no word PATTERN=FORMAT" in result.stderr


@pytest.mark.parametrize("file", ["model-00002-of-00003.safetensors", "config.json"])
def test_a_file_of_the_models_folder_is_not_replaced(tmp_path: Path, file: str) -> None:
    folder = Path(shutil.copytree(GOLDEN / "models" / "llama", tmp_path / "model"))
    before = (folder / file).read_bytes()
    result = run(folder, folder / file, "--to", "q8_0", code=1)
    assert "which is read; give another name" in result.stderr
    assert (folder / file).read_bytes() == before


def test_a_name_that_is_too_long_is_the_one_that_was_given(model: Path, tmp_path: Path) -> None:
    """The unfinished file's name is longer, and nobody has asked for it."""
    name = "o" * 240
    result = run(model, tmp_path / name, "--to", "q4_0", code=1)
    assert f"{name} cannot be written: File name too long" in result.stderr
    assert left_in(tmp_path) == ["model.gguf"]


def test_a_full_disk_leaves_nothing(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_writer, "publish", full)
    result = run(model, tmp_path / "out.gguf", "--to", "q4_0", code=1)
    assert "out.gguf cannot be written: No space left on device" in result.stderr
    assert left_in(tmp_path) == ["model.gguf"]


def test_a_disk_without_room_is_told_before_anything_is_written(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    result = run(model, tmp_path / "out.gguf", "--to", "q4_0", code=1)
    assert "and its disk has 1000 left" in result.stderr


def test_breaking_off_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with open_source(model) as source:
        plan = plan_quantization(source, find_file_type("q4_0"))
        written = write_quantized(source, tmp_path / "out.gguf", plan)
        next(written)
        assert len(left_in(tmp_path)) == 2
        written.close()
    assert left_in(tmp_path) == ["model.gguf"]


def test_ctrl_c_leaves_nothing_and_the_old_file(tmp_path: Path) -> None:
    path, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    big = encode_dense(np.random.default_rng(0).normal(size=(300_000, 256)).astype(np.float32))
    write_gguf(path, METADATA, (tensors("F32") | {"token_embd.weight": big}).items())
    out.write_bytes(b"old")
    command = [sys.executable, "-m", "pellucid", "quantize", str(path), str(out), "--to", "q2_k"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(left_in(tmp_path)) < 3:
        time.sleep(0.005)
    process.send_signal(2)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert left_in(tmp_path) == ["model.gguf", "out.gguf"] and out.read_bytes() == b"old"


def test_a_tensor_that_the_file_lacks_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "lacking.gguf"
    kept = {name: t for name, t in tensors().items() if "blk.1.ffn_up" not in name}
    write_gguf(path, METADATA, kept.items())
    with pytest.raises(FormatError, match=r"lacks the tensor 'blk\.1\.ffn_up\.weight'"):
        open_source(path)
