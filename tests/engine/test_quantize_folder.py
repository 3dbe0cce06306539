"""`pellucid quantize` for types of folders: what it writes, what it says, what it refuses."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pellucid import LLM, SamplingParams
from pellucid.cli.main import main
from pellucid.errors import ConfigError
from pellucid.quant.folder_types import find_folder_type, find_type, folder_type_names
from pellucid.tokenizer import load_tokenizer
from pellucid.weights.checkpoint import open_checkpoint

from .conftest import write_tiny

TEXT = Path(__file__).parents[1] / "golden" / "imatrix" / "text.txt"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("folders") / "tiny.gguf", ffn=64)


def run(*arguments: object, code: int = 0) -> Any:
    result = CliRunner().invoke(main, ["quantize", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_a_calibrated_folder_with_its_report(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    kind = "gptq-int4-g32-actorder"
    shown = run(model, out, "--to", kind, "--calibration", TEXT, "--json")
    report = json.loads(shown.stdout)
    assert report["type"] == kind and report["folder"] == str(out)
    errors = [t["relative_error"] for t in report["tensors"] if t["to"] == "INT4 g32"]
    assert errors and all(0 < error < 0.5 for error in errors)
    assert report["folder_bytes"] == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert f"as {kind}" in shown.stderr
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"]["bits"] == 4 and config["model_type"] == "llama"
    assert (config["eos_token_id"], config["pad_token_id"]) == (257, None)
    # the tokenizer cuts as that of the file does
    text = TEXT.read_text()[:2000] + "<|im_end|>"
    with open_checkpoint(model) as before, open_checkpoint(out) as after:
        assert load_tokenizer(before.tokenizer_source).encode(text) == load_tokenizer(out).encode(
            text
        )
        assert after.config.hidden_size == before.config.hidden_size
    # and it runs
    prompt, params = "the moth", SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    for backend in ("native", "reference"):
        (answer,) = LLM(out, backend=backend).generate([prompt], params)
        assert len(answer.outputs[0].token_ids) == 8


def test_people_see_an_estimate_and_a_table(model: Path, tmp_path: Path) -> None:
    shown = run(model, tmp_path / "out", "--to", "w4a16-g32", "--method", "rtn")
    assert "weights become" in shown.stderr and "as w4a16-g32" in shown.stderr
    assert "INT4 g32" in shown.stdout and "bits per weight" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "gptq-int4-g128"], "gptq-int4-g128 needs a calibration text; give --calibration"),
        (["--to", "gptq-int4-g16"], "did you mean gptq-int4-g"),
        (["--to", "gptq-int5-g128"], "type is 'gptq-int5-g128' (did you mean gptq-int"),
        (["--to", "q4km"], "did you mean q4_k_m"),
        (["--to", "int8", "--calibration", TEXT], "int8 makes no use of it"),
        (["--to", "int8", "--method", "ef"], "--method is 'ef'; for int8 it may be: rtn"),
        (
            ["--to", "w8a16", "--method", "rtn", "--calibration", TEXT],
            "w8a16 with --method rtn makes no use of it",
        ),
        (["--to", "int8", "--imatrix", "x"], "--imatrix is for types of GGUF files"),
        (["--to", "int8", "--type-map", "x"], "--type-map is for types of GGUF files"),
    ],
)
def test_wrong_options_are_one_sentence(
    model: Path, arguments: list[Any], sentence: str, tmp_path: Path
) -> None:
    shown = run(model, tmp_path / "out", *arguments, code=1)
    assert sentence in shown.stderr and shown.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    shown = run(model, tmp_path, "--to", "int8", code=1)
    assert "a folder that is not empty" in shown.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--to", "w4a16-g32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pellucid", *arguments, "--calibration", str(TEXT)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(2)
    process.communicate()
    # it may have been done already: then the folder is whole, whatever the exit code
    assert process.returncode in (0, 130)
    left = [path.name for path in tmp_path.iterdir()]
    assert left == ["out"] if process.returncode == 0 else left in ([], ["out"])
    if left:
        open_checkpoint(tmp_path / "out").close()


def test_all_names_are_found() -> None:
    names = folder_type_names()
    assert len(names) == len(set(names)) > 70
    for name in names:
        found = find_folder_type(name.upper())
        assert found is not None and found.name == name
    for name in ("q4_k_m", "gptq-int4", "gptq-int4-g128-", "w3a16", "int4"):
        assert find_folder_type(name) is None
    with pytest.raises(ConfigError, match="type is 'nothing'"):
        find_type("nothing")
