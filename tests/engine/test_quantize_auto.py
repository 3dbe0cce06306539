"""`pellucid quantize` that chooses formats by damage: files that run, the budget, and errors."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid import LLM, SamplingParams
from pellucid.cli.main import main
from pellucid.config import ModelConfig
from pellucid.errors import ConfigError
from pellucid.formats import dequantize, quantize
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import KVLayer
from pellucid.quant.auto_types import find_candidates, plan_budget
from pellucid.quant.calibrate import cut_calibration
from pellucid.quant.damage import DamageMeter
from pellucid.quant.encode import Encoder
from pellucid.quant.gradients import window_batch
from pellucid.quant.sequential import source_loader
from pellucid.quant.source import open_source
from pellucid.quant.tape import Floats, Tape
from pellucid.quant.type_map import Rule
from pellucid.tokenizer import load_tokenizer
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

from .conftest import write_tiny

TEXT = (Path(__file__).parents[1] / "golden" / "imatrix" / "text.txt").read_text() * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto")
    (folder / "text.txt").write_text(TEXT)
    return write_tiny(folder / "tiny.gguf", ffn=256)


def run(model: Path, out: Path, *options: str, code: int = 0) -> Any:
    text = str(model.parent / "text.txt")
    command = ["quantize", str(model), str(out), "--calibration", text, *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == code, done.output
    return done


def report_of(model: Path, out: Path, *options: str) -> dict[str, Any]:
    done = run(model, out, "--json", "--calibration-chunks", "4", *options)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@pytest.mark.parametrize("bits", [5.0, 5.9, 8.2])
def test_a_file_has_at_most_the_bits_that_were_asked_for(
    model: Path, tmp_path: Path, bits: float
) -> None:
    report = report_of(model, tmp_path / "out", "--target-bpw", str(bits))
    assert bits - 0.3 < report["bits_per_weight"] <= bits
    assert report["type"] == "auto"
    llm = LLM(str(tmp_path / "out"), max_model_len=96)
    assert llm.generate(["Hello"], SamplingParams(max_tokens=4, temperature=0))
    llm.close()


def test_the_chosen_map_gives_the_same_formats_again(model: Path, tmp_path: Path) -> None:
    first = report_of(model, tmp_path / "a", "--to", "q4_k_m", "--type-map", "auto")
    plain = report_of(model, tmp_path / "b", "--to", "q4_k_m")
    total = [sum(t["bytes"] for t in r["tensors"]) for r in (first, plain)]
    assert total[0] <= total[1]
    (tmp_path / "map").write_text("\n".join(first["type_map"]))
    again = report_of(model, tmp_path / "c", "--to", "q8_0", "--type-map", str(tmp_path / "map"))
    formats = [[(t["name"], t["to"]) for t in r["tensors"]] for r in (first, again, plain)]
    assert formats[0] == formats[1] != formats[2]
    # and the choice is the same each time
    report_of(model, tmp_path / "d", "--to", "q4_k_m", "--type-map", "auto")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "d").read_bytes()


def test_rules_of_a_type_map_precede_the_choice(model: Path, tmp_path: Path) -> None:
    (tmp_path / "map").write_text("attn_q=q8_0 token_embd=f16")
    options = ["--target-bpw", "7", "--type-map", str(tmp_path / "map"), "--method", "imatrix"]
    report = report_of(model, tmp_path / "out", *options)
    formats = {t["name"]: t["to"] for t in report["tensors"]}
    assert formats["token_embd.weight"] == "F16"
    assert {f for name, f in formats.items() if "attn_q." in name} == {"Q8_0"}
    assert report["bits_per_weight"] <= 7


def test_damages_are_kl_divergences(model: Path) -> None:
    """Of one tensor in one format: what is estimated, and what is measured on the same text."""
    name, param = "blk.0.ffn_up.weight", "layers.0.up_proj.weight"
    with open_checkpoint(model) as checkpoint:
        windows = cut_calibration(load_tokenizer(checkpoint.tokenizer_source), TEXT, 96)[:24]
    with open_source(model) as source:
        meter = DamageMeter(source, windows, {name: ["Q4_0", "Q8_0"]}, Encoder(1).encode)
        damages = meter.run()[name]
        config = source.config
        names = [p.name for p in get_graph(config.graph).parameters(config)]
        weights = dict(source_loader(source)(names))
        exact = log_probs(config, weights, windows)
        for format, damage in damages.items():
            made = Encoder(1).encode(weights[param], format, meter.importance[name])
            other = log_probs(config, weights | {param: dequantize(made)}, windows)
            kl = float((np.exp(exact) * (exact - other)).sum(axis=-1).mean())
            assert damage == pytest.approx(kl, rel=0.5), format
    assert damages["Q4_0"] > 50 * damages["Q8_0"]


def log_probs(config: ModelConfig, weights: dict[str, Floats], windows: Any) -> Any:
    """ln p of every token after each token [W, n, V]."""
    graph, found = get_graph(config.graph), []
    for tokens in windows:
        tape, batch = Tape(weights), window_batch(tokens)
        stores = [KVLayer(tape.new_store()) for _ in range(config.num_layers)]
        x = graph.embed(tape, config, weights, batch)
        x = graph.layers(tape, config, weights, batch, range(config.num_layers), stores, x)
        logits = graph.head(tape, config, weights, batch, x).value.astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        found.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return np.stack(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target-bpw", "1"], "--target-bpw is 1; the smallest file of"),
        (["--target-bpw", "40"], "a larger file would gain nothing"),
        (["--target-bpw", "nan"], "it must be a positive number"),
        (["--target-bpw", "-1"], "it must be a positive number"),
        (["--target-bpw", "5", "--to", "q4_0"], "are both given"),
        (["--type-map", "auto"], "--type-map auto needs a size"),
        (["--to", "f16", "--type-map", "auto"], "and --to f16 has none"),
        ([], "neither --to nor --target-bpw is given"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    options: list[str], message: str, model: Path, tmp_path: Path
) -> None:
    result = run(model, tmp_path / "out", *options, code=1)
    assert message in result.stderr and result.stderr.count("\n") <= 3
    assert not (tmp_path / "out").exists()


def test_a_calibration_text_is_needed(model: Path, tmp_path: Path) -> None:
    for options in (["--target-bpw", "5"], ["--to", "q4_0", "--type-map", "auto"]):
        command = ["quantize", str(model), str(tmp_path / "out"), *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 1 and "give --calibration" in result.stderr


def test_a_quantized_source_needs_permission(model: Path, tmp_path: Path) -> None:
    with GGUFFile.open(model) as file:
        metadata = dict(file.metadata.typed())
        tensors = {name: file.tensor(name) for name in file.tensors}
    name = "blk.0.attn_q.weight"
    values = np.random.default_rng(0).normal(size=tensors[name].shape).astype(np.float32)
    tensors[name] = quantize(values, "Q8_0")
    write_gguf(tmp_path / "q.gguf", metadata, tensors.items())
    (tmp_path / "text.txt").write_text(TEXT)
    result = run(tmp_path / "q.gguf", tmp_path / "out", "--target-bpw", "6", code=1)
    assert f"tensor {name!r} is Q8_0" in result.stderr


def test_rows_that_no_format_holds_keep_their_format(model: Path, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "odd.gguf", ffn=40)  # rows of 32 and of 40 values
    with open_source(path) as source:
        formats = find_candidates(source, [])
        assert formats["blk.0.ffn_down.weight"] == ("F16", "F32")
        assert "Q5_1" in formats["blk.0.ffn_up.weight"]
        fixed = [Rule(re.compile("."), "F16")]
        with pytest.raises(ConfigError, match="no tensor whose format can be chosen"):
            plan_budget(source, 1 << 20, "--target-bpw is 16", fixed)
