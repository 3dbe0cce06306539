"""`pellucid quantize` with a calibration text: files that run, and what cannot be done."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid import LLM, SamplingParams
from pellucid.cli.main import main
from pellucid.formats import dequantize
from pellucid.quant.calibrate import Walk, cut_calibration
from pellucid.quant.error_feedback import quadratic_loss
from pellucid.quant.imatrix import read_imatrix
from pellucid.quant.sequential import source_loader
from pellucid.quant.source import open_source
from pellucid.tokenizer import load_tokenizer
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.gguf import GGUFFile

from .conftest import write_tiny

TEXT = (Path(__file__).parents[1] / "golden" / "imatrix" / "text.txt").read_text() * 16
FFN = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibrated")
    (folder / "text.txt").write_text(TEXT)
    return write_tiny(folder / "tiny.gguf", ffn=FFN)


def quantize(model: Path, out: Path, *options: str) -> dict[str, Any]:
    done = CliRunner().invoke(main, ["quantize", str(model), str(out), "--json", *options])
    assert done.exit_code == 0, done.output
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def tensors(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile.open(path) as file:
        return {name: dequantize(file.tensor(name)) for name in file.tensors}


def test_error_feedback_loses_less_in_the_same_bytes(model: Path, tmp_path: Path) -> None:
    text = str(model.parent / "text.txt")
    reports = {
        method: quantize(
            model, tmp_path / method, "--to", "q4_0", "--calibration", text, "--method", method
        )
        for method in ("ef", "imatrix")
    }
    assert reports["ef"]["file_bytes"] < reports["imatrix"]["file_bytes"]  # no words about imatrix
    formats = [[(t["name"], t["to"]) for t in r["tensors"]] for r in reports.values()]
    assert formats[0] == formats[1]
    # each layer's products lose less, on the inputs of the float model
    with open_checkpoint(model) as checkpoint:
        windows = cut_calibration(load_tokenizer(checkpoint.tokenizer_source), TEXT, 96)
    hessians: dict[str, np.ndarray] = {}

    def observe(group: str, x: np.ndarray) -> None:
        hessians[group] = hessians.get(group, 0) + x.T.astype(np.float64) @ x

    with open_source(model) as source:
        walk = Walk(source.config, source_loader(source), windows)
        for layer in range(walk.config.num_layers):
            walk.run_layer(layer, walk.load_layer(layer), observe)
    exact, found = tensors(model), {method: tensors(tmp_path / method) for method in reports}
    name, group = "blk.0.attn_q.weight", "layers.0.attn_input"  # behind nothing that is quantized
    lost = {
        method: quadratic_loss(exact[name] - found[method][name], hessians[group])
        for method in reports
    }
    assert lost["ef"] < 0.8 * lost["imatrix"]
    # and the file runs
    llm = LLM(str(tmp_path / "ef"), max_model_len=96)
    assert llm.generate(["Hello"], SamplingParams(max_tokens=4, temperature=0))
    llm.close()


def test_ef_is_the_default_where_a_calibration_is_given(model: Path, tmp_path: Path) -> None:
    text = str(model.parent / "text.txt")
    quantize(model, tmp_path / "a", "--to", "q4_0", "--calibration", text)
    quantize(model, tmp_path / "b", "--to", "q4_0", "--calibration", text, "--method", "ef")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_int2_is_q2_k_with_error_feedback(model: Path, tmp_path: Path) -> None:
    text = str(model.parent / "text.txt")
    quantize(model, tmp_path / "a", "--to", "int2", "--calibration", text)
    quantize(model, tmp_path / "b", "--to", "q2_k", "--calibration", text)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for options in ([], ["--calibration", text, "--method", "imatrix"]):
        command = ["quantize", str(model), str(tmp_path / "c"), "--to", "int2", *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and "int2 is q2_k with error feedback" in result.stderr


def test_an_imatrix_file_gives_what_its_text_gives(model: Path, tmp_path: Path) -> None:
    text, matrix = str(model.parent / "text.txt"), tmp_path / "imatrix.gguf"
    command = ["imatrix", str(model), "--text", text, "-o", str(matrix), "--n-ctx", "96"]
    assert CliRunner().invoke(main, [*command, "--chunks", "32"]).exit_code == 0
    quantize(model, tmp_path / "a", "--to", "q4_0", "--imatrix", str(matrix))
    quantize(model, tmp_path / "b", "--to", "q4_0", "--calibration", text, "--method", "imatrix")
    quantize(model, tmp_path / "c", "--to", "q4_0")
    first, second, plain = (tensors(tmp_path / name) for name in "abc")
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    assert any(not np.array_equal(first[name], plain[name]) for name in first)
    with GGUFFile.open(tmp_path / "a") as file:
        assert file.metadata["quantize.imatrix.file"] == str(matrix)
        entries = len(read_imatrix(matrix).entries)
        assert file.metadata["quantize.imatrix.entries_count"] == entries


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "ef"], "--method ef needs a calibration text"),
        (["--method", "imatrix"], "--method imatrix needs --imatrix or --calibration"),
        (["--calibration", "text.txt", "--imatrix", "x"], "are both given"),
        (["--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--calibration", "c4"], "PELLUCID_DATA, which is not set"),
        (["--imatrix", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    options: list[str], message: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PELLUCID_DATA", raising=False)
    monkeypatch.chdir(model.parent)
    command = ["quantize", str(model), str(tmp_path / "out.gguf"), "--to", "q4_0", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and message in done.output
    assert not list(tmp_path.iterdir())
