"""Importance matrices: the numbers and the files of llama-imatrix (tests/golden/imatrix)."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.cli.main import main
from pellucid.errors import FormatError
from pellucid.formats import encode_dense
from pellucid.quant.imatrix import Entry, ImportanceMatrix, read_imatrix, write_imatrix
from pellucid.weights.gguf_writer import write_gguf

from .conftest import write_tiny

GOLDEN = Path(__file__).parents[1] / "golden" / "imatrix"
N_CTX = 32


def run(model: Path, out: Path, *options: str) -> ImportanceMatrix:
    text = str(GOLDEN / "text.txt")
    command = ["imatrix", str(model), "--text", text, "-o", str(out), "--n-ctx", str(N_CTX)]
    done = CliRunner().invoke(main, [*command, *options])
    assert done.exit_code == 0, done.output
    return read_imatrix(out)


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_the_sums_of_squares_are_those_of_llama_imatrix(name: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf", add_bos=name == "bos")
    ours, theirs = run(model, tmp_path / "ours.gguf"), read_imatrix(GOLDEN / f"{name}.gguf")
    assert ours.entries.keys() == theirs.entries.keys()
    assert (ours.chunk_count, ours.chunk_size) == (theirs.chunk_count, theirs.chunk_size)
    for weight, entry in ours.entries.items():
        np.testing.assert_array_equal(entry.counts, theirs.entries[weight].counts)
        np.testing.assert_allclose(entry.sums, theirs.entries[weight].sums, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "bos"])
def test_a_file_that_is_read_and_written_keeps_its_bytes(name: str, tmp_path: Path) -> None:
    write_imatrix(tmp_path / "again.gguf", read_imatrix(GOLDEN / f"{name}.gguf"))
    assert (tmp_path / "again.gguf").read_bytes() == (GOLDEN / f"{name}.gguf").read_bytes()


def test_the_matrix_of_the_logits_is_measured_where_it_is_asked_for(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")
    plain, whole = (run(model, tmp_path / "a"), run(model, tmp_path / "b", "--process-output"))
    assert whole.entries.keys() - plain.entries.keys() == {"token_embd.weight"}  # it is tied
    found = whole.entries["token_embd.weight"]
    assert found.counts == plain.entries["blk.0.attn_q.weight"].counts and found.sums.min() > 0


def test_few_chunks_are_used_where_few_are_asked_for(tmp_path: Path) -> None:
    matrix = run(write_tiny(tmp_path / "tiny.gguf"), tmp_path / "out", "--chunks", "2")
    assert matrix.chunk_count == 2
    assert {float(e.counts[0]) for e in matrix.entries.values()} == {2.0 * N_CTX}


def test_a_matrix_of_an_expert_without_tokens_counts_every_column_once() -> None:
    entry = Entry(np.array([[2, 4], [0, 0]], np.float32), np.array([2, 0], np.float32))
    np.testing.assert_array_equal(entry.means, [1, 2, 1, 1])


SUMS, COUNTS = encode_dense(np.ones(4, np.float32)), encode_dense(np.ones(1, np.float32))
NEGATIVE = encode_dense(np.array([1, -1, 1, 1], np.float32))
THREE = encode_dense(np.ones((3, 1), np.float32))


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"general.type": "model"}, {"w.in_sum2": SUMS}, "general.type is not 'imatrix'"),
        ({"general.type": "imatrix"}, {"w": SUMS}, "without entries"),
        ({"general.type": "imatrix"}, {"w.in_sum2": SUMS}, "'w.counts' is missing"),
        (
            {"general.type": "imatrix"},
            {"w.in_sum2": NEGATIVE, "w.counts": COUNTS},
            "negative or non-finite",
        ),
        ({"general.type": "imatrix"}, {"w.in_sum2": SUMS, "w.counts": THREE}, "3 counts for 4"),
        (
            {"general.type": "imatrix", "imatrix.datasets": 3},
            {"w.in_sum2": SUMS, "w.counts": COUNTS},
            "datasets is not a list",
        ),
    ],
)
def test_a_file_that_is_no_importance_matrix_is_refused(
    metadata: dict[str, object], tensors: dict[str, object], message: str, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "bad.gguf", metadata, tensors.items())  # type: ignore[arg-type]
    with pytest.raises(FormatError, match=message):
        read_imatrix(tmp_path / "bad.gguf")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("short", [], "has 5 tokens; at least 32 are needed"),
        ("long " * 100, ["--n-ctx", "5000"], "n_ctx is 5000; tiny.gguf sees at most 96"),
        ("long " * 100, ["-o", "nowhere/out.gguf"], "there is no folder 'nowhere'"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(
    text: str, options: list[str], message: str, tmp_path: Path
) -> None:
    model = write_tiny(tmp_path / "tiny.gguf")
    (tmp_path / "text.txt").write_text(text)
    command = ["imatrix", str(model), "--text", str(tmp_path / "text.txt")]
    command += ["-o", str(tmp_path / "out.gguf"), "--n-ctx", str(N_CTX), *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1 and message in done.output
    assert not (tmp_path / "out.gguf").exists()
