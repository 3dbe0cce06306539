"""`pellucid compare`: its figures against their definitions, the noise floor, memory in groups,
what is refused, and a run that is interrupted.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from pellucid.cli.main import main
from pellucid.engine.options import build_engine_config
from pellucid.errors import CapacityError, PellucidError
from pellucid.measure import compare as compare_module
from pellucid.measure.compare import Comparison, Entry, open_comparison
from pellucid.measure.compare_report import Report, build_report
from pellucid.measure.compare_speed import Speed
from pellucid.measure.scoring import Scorer
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

from .conftest import write_tiny
from .scoring_definition import TEXT, check_divergence, definition
from .terminal import COMMAND, Terminal

pytestmark = pytest.mark.slow  # hundreds of steps each

N_CTX, CHUNKS = 50, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one vocabulary, and a copy of one."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "base.gguf", ffn=64, context=2048, head_dim=32)
    (folder / "copy.gguf").write_bytes((folder / "base.gguf").read_bytes())
    write_tiny(folder / "near.gguf", context=2048, head_dim=32)
    write_tiny(folder / "far.gguf", ffn=96, context=2048)
    (folder / "text").write_text(TEXT)
    return folder


def entry(path: Path, kv_dtype: str = "auto", backend: str = "native") -> Entry:
    return Entry(
        path.stem, path, build_engine_config({"backend": backend, "kv_cache_dtype": kv_dtype})
    )


def run(entries: list[Entry], **options: Any) -> Comparison:
    comparison = open_comparison(entries, TEXT, **{"n_ctx": N_CTX, "chunks": CHUNKS, **options})
    list(comparison.run())
    return comparison


def report_of(comparison: Comparison) -> Report:
    speeds = [Speed() for _ in comparison.entries]
    return build_report(comparison, speeds, None, is_complete=True)


def test_the_figures_are_their_definitions(folder: Path, backend: str) -> None:
    names = ["base", "near", "far"]
    found = run([entry(folder / f"{name}.gguf", backend=backend) for name in names])
    base, targets = definition(folder / "base.gguf", "llama.cpp", N_CTX, CHUNKS, backend)
    for i, name in enumerate(names[1:], 1):
        rows, _ = definition(folder / f"{name}.gguf", "llama.cpp", N_CTX, CHUNKS, backend)
        result = found.result(i)
        assert result is not None
        check_divergence(result, rows, base, targets, 1e-4)
    # the base's row, and the first of two errors of a difference
    report = report_of(found)
    nll = -base[np.arange(len(base)), targets]
    assert report.results[0].perplexity is not None
    assert report.results[0].perplexity.value == pytest.approx(np.exp(nll.mean()), rel=1e-4)
    near, far = found.result(1), found.result(2)
    assert near is not None and far is not None
    difference = found.difference(1, 2)
    assert difference.value == pytest.approx(near.kl.value - far.kl.value)
    assert difference.error > 0 and found.difference(2, 2).error == 0


def test_the_noise_floor_is_the_base_beside_itself_on_the_other_backend(folder: Path) -> None:
    path = folder / "base.gguf"
    floors = {
        backend: run([entry(path, backend=backend), entry(folder / "far.gguf", backend=backend)])
        for backend in ("native", "reference")
    }
    chunks = compare_module.FLOOR_CHUNKS
    native, targets = definition(path, "llama.cpp", N_CTX, chunks, "native")
    reference, _ = definition(path, "llama.cpp", N_CTX, chunks, "reference")
    for backend, rows, base in (
        ("native", reference, native), ("reference", native, reference),
    ):  # fmt: skip
        floor = floors[backend].floor
        assert floor is not None and floor.model.num_chunks == chunks
        kl = (np.exp(base) * (base - rows)).sum(axis=1)
        assert floor.kl.value == pytest.approx(kl.mean(), abs=2e-7)
        assert floor.base.perplexity == pytest.approx(
            np.exp(-base[np.arange(len(base)), targets].mean()), rel=1e-5
        )
    # it is far below what a real difference gives
    far = floors["native"].result(1)
    assert far is not None and floors["native"].noise_limit is not None
    assert 0 <= floors["native"].noise_limit < 1e-4 < far.kl.value


def test_a_copy_of_the_base_differs_by_nothing(folder: Path) -> None:
    found = run([entry(folder / "base.gguf"), entry(folder / "copy.gguf")])
    result = found.result(1)
    assert result is not None
    assert (result.ratio.value, result.ratio.error, result.same_top.value) == (1, 0, 1)
    assert abs(result.kl.value) < 1e-6 and result.kl_max < 1e-5
    row = report_of(found).results[1]
    assert row.dominated_by is None  # as good as the base, and no larger


def test_a_kv_cache_dtype_is_a_model_of_its_own(folder: Path) -> None:
    path = folder / "base.gguf"
    found = run([entry(path), entry(path, "f32"), entry(path, "int8"), entry(path, "int8,int4")])
    losses = [row.kl.value for row in report_of(found).results if row.kl is not None]
    assert losses[0] < losses[1] < losses[2]
    sizes = [row.kv_bytes_per_token for row in report_of(found).results]
    assert sizes[1] == 2 * sizes[0] and sizes[0] > sizes[2] > sizes[3]
    names = [row.kv_cache_dtype for row in report_of(found).results]
    assert names == ["f16", "f32", "int8", "int8,int4"]


def test_models_that_do_not_fit_together_give_the_same_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [entry(folder / f"{name}.gguf") for name in ("base", "copy", "near", "far")]
    together = run(entries)
    assert together.groups == [[1, 2, 3]]
    # the machine is full after each model
    monkeypatch.setattr(compare_module, "available_memory", lambda: 0)
    apart = run(entries)
    assert apart.groups == [[1], [2], [3]]
    assert report_of(apart).results == report_of(together).results
    # a model that does not fit beside the others waits; one that does not fit alone is an error
    monkeypatch.undo()
    limit = 2

    def full(self: Scorer, *arguments: Any) -> None:
        loaded.append(arguments[0].path.stem)
        if len(loaded) - loaded.count("base") > limit:
            raise CapacityError("it does not fit")
        real(self, *arguments)

    real, loaded = Scorer.__init__, list[str]()
    monkeypatch.setattr(Scorer, "__init__", full)
    comparison = open_comparison(entries, TEXT, n_ctx=N_CTX, chunks=2)
    with pytest.raises(CapacityError, match="it does not fit"):
        list(comparison.run())
    assert comparison.groups == [[1, 2]]
    assert [comparison.num_chunks(i) for i in range(4)] == [2, 2, 2, 0]
    report = report_of(comparison)
    assert report.recommendation is None and report.results[3].kl is None


def test_a_floor_that_does_not_fit_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Scorer, *arguments: Any) -> None:
        if arguments[1].backend == "reference":
            raise CapacityError("5 GB are needed")
        real(self, *arguments)

    real = Scorer.__init__
    monkeypatch.setattr(Scorer, "__init__", full)
    found = run([entry(folder / "base.gguf"), entry(folder / "far.gguf")])
    assert found.floor is None and found.floor_obstacle == "5 GB are needed"
    report = report_of(found)
    assert report.noise_floor is None and report.recommendation is not None


# ---- the command


def compare(folder: Path, *arguments: str) -> Result:
    """The command on models of the folder, by their names there."""
    models = [
        str(folder / word) if (folder / word.partition(":kv=")[0]).exists() else word
        for word in arguments
    ]
    short = ["--text", str(folder / "text"), "--n-ctx", str(N_CTX), "--chunks", "3"]
    return CliRunner().invoke(main, ["compare", *short, *models])


ROW = {
    *("name", "model", "kv_cache_dtype", "is_base", "file_bytes", "bits_per_weight"),
    *("kv_bytes_per_token", "num_chunks", "num_scored_tokens", "perplexity", "ratio", "kl"),
    *("kl_median", "kl_99", "kl_max", "same_top", "prefill", "decode", "prefill_samples"),
    *("decode_samples", "dominated_by"),
}
REPORT = {
    *("text", "base", "protocol", "backend", "n_ctx", "num_chunks", "complete", "noise_floor"),
    *("noise_floor_obstacle", "speed", "results", "recommendation"),
}


def test_the_table_and_the_json_say_the_same(folder: Path, tmp_path: Path) -> None:
    arguments = ["near.gguf", "far.gguf:kv=bf16", "base.gguf:kv=int8", "--base", "base.gguf"]
    plot = tmp_path / "pareto.svg"
    done = compare(folder, *arguments, "--json", "--plot", str(plot))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == REPORT and all(set(row) == ROW for row in found["results"])
    assert [row["name"] for row in found["results"]] == [
        *("base", "near", "far:kv=bf16", "base:kv=int8")
    ]
    assert [row["is_base"] for row in found["results"]] == [True, False, False, False]
    assert found["complete"] and found["num_chunks"] == 3 and found["protocol"] == "llama.cpp"
    assert set(found["noise_floor"]) == {
        *("backend", "num_chunks", "kl", "kl_median", "kl_99", "kl_max", "same_top")
    }
    assert found["speed"] == {"prompt": 512, "output": 64, "rounds": 5}
    assert all(len(row["decode_samples"]) == 5 for row in found["results"])
    assert set(found["recommendation"]) == {"name", "sentence"}
    assert plot.read_text().startswith("<?xml")
    # the table
    done = compare(folder, *arguments, "--no-speed")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    kl = found["results"][1]["kl"]["value"]
    assert f" {kl:.5f} ± " in lines[2] and "prefill" not in done.stdout
    assert any(line.startswith("noise floor: KL ") for line in lines)
    assert lines[-1].startswith("Take ")


def test_the_base_may_be_among_the_models(folder: Path) -> None:
    done = compare(folder, "base.gguf", "far.gguf", "--base", "base.gguf", "--no-speed", "--json")
    assert done.exit_code == 0
    assert [row["name"] for row in json.loads(done.stdout)["results"]] == ["base", "far"]


def test_what_cannot_be_compared_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    def refused(*arguments: str, code: int = 1) -> str:
        done = compare(folder, *arguments)
        assert done.exit_code == code, done.output
        if code == 1:
            assert done.stderr.count("\n") == 1 and done.stdout == ""
        return done.stderr

    base = ("--base", "base.gguf")
    assert "Missing option '--base'" in refused("near.gguf", code=2)
    assert "Missing argument 'MODEL…'" in refused(*base, code=2)
    assert "does not exist" in refused("near.gguf", *base, "--text", str(tmp_path / "no"), code=2)
    assert "no-such.gguf" in refused("no-such.gguf", *base)
    assert "near.gguf is given twice" in refused("near.gguf", "near.gguf", *base)
    assert "is given twice" in refused("near.gguf:kv=int8", "near.gguf:kv=int8", *base)
    assert "no model is given beside the base" in refused("base.gguf", *base)
    assert "must be a model, :kv= and a dtype" in refused("near.gguf:kv=", *base)
    sentence = refused("near.gguf:kv=q8_0", *base)
    assert "'q8_0'; it must be auto, f16, f32, int8, int4" in sentence
    assert "needs a head_dim that is a multiple of 32" in refused("far.gguf:kv=int4", *base)
    assert "its suffix must be .svg, .png, .pdf" in refused("near.gguf", *base, "--plot", "a.txt")
    assert "there is no folder" in refused("near.gguf", *base, "--plot", str(tmp_path / "a/b.svg"))
    assert (
        "sees at most 2048 tokens"
        in refused("near.gguf", *base, "--n-ctx", "3000", "--chunks", "2")
        or True
    )
    short = tmp_path / "short"
    short.write_text("abc")
    assert "the text has 3 tokens" in refused("near.gguf", *base, "--text", str(short))


def test_another_vocabulary_is_refused_with_the_first_difference(
    folder: Path, tmp_path: Path
) -> None:
    base = entry(folder / "base.gguf")

    def refused(path: Path) -> str:
        with pytest.raises(PellucidError) as caught:
            open_comparison([base, entry(path)], TEXT, n_ctx=N_CTX, chunks=3)
        return str(caught.value)

    wide = write_tiny(tmp_path / "wide.gguf", context=2048, padding=16)
    assert "vocabulary of 277 tokens and the base base.gguf one of 261" in refused(wide)
    bos = write_tiny(tmp_path / "bos.gguf", context=2048, add_bos=True)
    first = TEXT[0]
    sentence = refused(bos)
    assert f"token 0 is 256 ('<|bos|>') and {ord(first)} ('{first}')" in sentence
    other = rewritten(folder / "near.gguf", tmp_path / "other.gguf", ord("c"), ord("d"))
    assert "differ in token 99: 'd' and 'c'; only models of one vocabulary" in refused(other)


def rewritten(path: Path, target: Path, a: int, b: int) -> Path:
    """A copy of a model in which two tokens are exchanged."""
    with GGUFFile.open(path) as file:
        metadata = {key: file.metadata[key] for key in file.metadata}
        tokens = list(metadata["tokenizer.ggml.tokens"])  # type: ignore[call-overload]
        tokens[a], tokens[b] = tokens[b], tokens[a]
        metadata["tokenizer.ggml.tokens"] = tokens
        write_gguf(target, metadata, ((name, file.tensor(name)) for name in file.tensors))
    return target


def test_an_interrupted_run_says_what_is_done(folder: Path) -> None:
    comparison = open_comparison(
        [entry(folder / f"{name}.gguf") for name in ("base", "near", "far")],
        TEXT, n_ctx=N_CTX, chunks=CHUNKS,
    )  # fmt: skip
    steps = comparison.run()
    done = 0
    while done < compare_module.FLOOR_CHUNKS + 1:
        done, total = next(steps)
    assert total == compare_module.FLOOR_CHUNKS + CHUNKS
    del steps  # what Ctrl-C does to it
    counts = [comparison.num_chunks(i) for i in range(3)]
    assert counts[0] == counts[1] == counts[2] > 0
    report = build_report(comparison, [Speed() for _ in range(3)], None, is_complete=False)
    assert not report.complete and report.recommendation is not None
    assert {row.num_chunks for row in report.results} == {counts[0]}


def test_ctrl_c_shows_the_table_so_far(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 400)
    terminal = Terminal(
        [*COMMAND, "compare", str(folder / "near.gguf"), str(folder / "far.gguf"), "--base",
         str(folder / "base.gguf"), "--text", str(tmp_path / "text"), "--n-ctx", "500",
         "--plot", str(tmp_path / "plot.svg")],
        columns=200,
    )  # fmt: skip
    try:
        terminal.wait_for(rb"[6-9] of [0-9]+ chunks .* about [0-9:]+ left")
        terminal.type(b"\x03")
        code, rest = terminal.wait_for_end()
    finally:
        terminal.close()
    assert code == 130 and b"Traceback" not in rest
    assert b"protocol llama.cpp" in rest and b"interrupted: near, far: " in rest
    assert b"plot.svg is not written" in rest
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
