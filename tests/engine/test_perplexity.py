"""Perplexity and KL divergence against their definitions; and the file of a base's predictions."""

import json
import random
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.cli.main import main
from pellucid.engine.loader import open_model
from pellucid.engine.options import build_engine_config
from pellucid.errors import CapacityError, ConfigError, FormatError, PellucidError, RequestError
from pellucid.measure import scoring
from pellucid.measure.divergence import Divergence
from pellucid.measure.evaluation import open_evaluation
from pellucid.measure.perplexity import PROTOCOLS, Perplexity, cut_windows
from pellucid.measure.scoring import Scorer

from .conftest import write_tiny
from .scoring_definition import TEXT, check_divergence, definition
from .terminal import COMMAND, Terminal

pytestmark = pytest.mark.slow  # hundreds of steps each


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models of one vocabulary, and one of another."""
    folder = tmp_path_factory.mktemp("models")
    write_tiny(folder / "plain.gguf", context=2048)
    write_tiny(folder / "bos.gguf", ffn=64, context=2048, add_bos=True)
    write_tiny(folder / "other.gguf", ffn=64, context=2048)
    write_tiny(folder / "windows.gguf", "gemma3", windows=[16, 0, 16], context=2048)
    (folder / "text").write_text(TEXT)
    return folder


def evaluate(
    path: Path, protocol: str = "llama.cpp", backend: str = "native", **options: object
) -> Perplexity | Divergence:
    config = build_engine_config({"backend": backend})
    with open_evaluation(path, config, TEXT, PROTOCOLS[protocol], **options) as evaluation:  # type: ignore[arg-type]
        *_, result = evaluation.run()
    return result


@pytest.mark.parametrize(
    ("name", "protocol", "n_ctx", "count"),
    [
        ("plain", "llama.cpp", 32, 7),
        ("bos", "llama.cpp", 33, 5),
        ("bos", "papers", 40, 5),
        ("plain", "papers", 140, 2),  # a window of three steps, the last of them partly full
        ("plain", "llama.cpp", 151, 2),
        ("windows", "papers", 90, 6),  # several layer groups
    ],
)
def test_perplexity_is_its_definition(
    folder: Path,
    backend: str,
    name: str,
    protocol: str,
    n_ctx: int,
    count: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "MAX_STEP", scoring.MIN_STEP)
    path = folder / f"{name}.gguf"
    found = evaluate(path, protocol, backend, n_ctx=n_ctx, chunks=count)
    assert isinstance(found, Perplexity)
    rows, targets = definition(path, protocol, n_ctx, count, backend)
    nll = -rows[np.arange(len(rows)), targets]
    per_chunk = n_ctx - 1 - n_ctx // 2 if protocol == "llama.cpp" else n_ctx - 1
    assert (found.num_chunks, found.num_scored_tokens) == (count, count * per_chunk)
    assert found.perplexity == pytest.approx(np.exp(nll.mean()), rel=1e-6)
    error = found.perplexity * np.sqrt((np.mean(nll**2) - nll.mean() ** 2) / (len(nll) - 1))
    assert found.error == pytest.approx(error, rel=1e-6)


def test_every_chunk_gives_the_result_so_far(folder: Path) -> None:
    config = build_engine_config({})
    with open_evaluation(
        folder / "plain.gguf", config, TEXT, PROTOCOLS["papers"], n_ctx=600, chunks=3
    ) as evaluation:
        results = list(evaluation.run())
    assert [r.num_chunks for r in results if isinstance(r, Perplexity)] == [1, 2, 3]


def test_divergence_is_its_definition(folder: Path, backend: str) -> None:
    model, base = folder / "plain.gguf", folder / "other.gguf"
    found = evaluate(model, backend=backend, n_ctx=50, chunks=12, base_path=base)
    rows, targets = definition(model, "llama.cpp", 50, 12, backend)
    base_rows, _ = definition(base, "llama.cpp", 50, 12, backend)
    check_divergence(found, rows, base_rows, targets, 1e-4)


def test_a_model_does_not_differ_from_itself(folder: Path) -> None:
    path = folder / "plain.gguf"
    found = evaluate(path, n_ctx=64, chunks=6, base_path=path)
    assert isinstance(found, Divergence)
    assert (found.ratio.value, found.ratio.error, found.same_top.value) == (1, 0, 1)
    assert abs(found.kl.value) < 1e-6 and found.kl_max < 1e-5 and found.delta_p_rms.value == 0


@pytest.mark.parametrize(("dtype", "rel"), [("float16", 2e-3), ("float32", 1e-4)])
def test_a_saved_base_gives_what_the_base_gives(
    folder: Path, tmp_path: Path, dtype: str, rel: float
) -> None:
    model, base, file = folder / "plain.gguf", folder / "other.gguf", tmp_path / "base"
    saving = evaluate(
        model, n_ctx=50, chunks=12, base_path=base, logits_file=file, logits_dtype=dtype
    )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    rows, targets = definition(model, "llama.cpp", 50, 12, "native")
    base_rows, _ = definition(base, "llama.cpp", 50, 12, "native")
    check_divergence(saving, rows, base_rows, targets, rel)
    assert evaluate(model, logits_file=file) == saving  # n_ctx and chunks are those of the file
    # the first chunks of the file, and another model
    part = evaluate(model, logits_file=file, chunks=5)
    assert part == evaluate(
        model, n_ctx=50, chunks=5, base_path=base, logits_file=tmp_path / "5", logits_dtype=dtype
    )
    itself = evaluate(base, logits_file=file)
    assert isinstance(itself, Divergence)
    assert itself.same_top.value == 1 and itself.kl_max < 1e-5 and itself.delta_p_rms.value < 1e-6


# ---- what does not fit


def saved(folder: Path, path: Path) -> Path:
    evaluate(
        folder / "plain.gguf", n_ctx=32, chunks=3, base_path=folder / "plain.gguf", logits_file=path
    )
    return path


def test_a_base_that_does_not_fit_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    plain = folder / "plain.gguf"
    with pytest.raises(RequestError, match="cut the text into different tokens"):
        evaluate(plain, n_ctx=32, base_path=folder / "bos.gguf")
    wide = write_wide(tmp_path / "wide.gguf")
    with pytest.raises(RequestError, match=r"vocabulary of 261 tokens and the base .* one of 277"):
        evaluate(plain, n_ctx=32, base_path=wide)
    file = saved(folder, tmp_path / "base")
    with pytest.raises(RequestError, match=r"of a model with 261 tokens; .* has 277"):
        evaluate(wide, logits_file=file)
    with pytest.raises(RequestError, match="made with n_ctx 32, scored from position 16; now"):
        evaluate(plain, n_ctx=64, logits_file=file)
    with pytest.raises(RequestError, match=r"scored from position 16; now .* scored from 0"):
        evaluate(plain, "papers", logits_file=file)
    with pytest.raises(RequestError, match="from another text, or with another tokenizer"):
        evaluate(folder / "bos.gguf", logits_file=file)
    with pytest.raises(RequestError, match="3 chunks; 4 are asked for"):
        evaluate(plain, logits_file=file, chunks=4)
    with pytest.raises(ConfigError, match="is not there; with --kl-base MODEL it is written"):
        evaluate(plain, logits_file=tmp_path / "other")
    with pytest.raises(ConfigError, match="is there already; leave out --kl-base"):
        evaluate(plain, n_ctx=32, base_path=plain, logits_file=file)


def write_wide(path: Path) -> Path:
    """The tiny model with a vocabulary that is filled up with 16 rows that no token has."""
    return write_tiny(path, context=2048, padding=16)


def test_a_damaged_file_is_refused(folder: Path, tmp_path: Path) -> None:
    file, plain = saved(folder, tmp_path / "base"), folder / "plain.gguf"
    good = file.read_bytes()
    header = struct.calcsize("<8s6I32s64s")

    def refused(data: bytes) -> str:
        file.write_bytes(data)
        with pytest.raises(FormatError) as caught:
            evaluate(plain, logits_file=file)
        return str(caught.value)

    assert "too short" in refused(b"")
    assert "too short" in refused(good[: header - 1])
    assert "its header says" in refused(good[:-1])
    assert "its header says" in refused(good + b"x")
    assert "no file of log-probabilities" in refused(b"GGUF" + good[4:])
    assert "llama.cpp's" in refused(b"_logits_" + good[8:])
    for i in range(3, 7):  # V, n_ctx, first, windows
        for value in (0, 1 << 31, 0xFFFFFFFF):
            changed = bytearray(good)
            struct.pack_into("<I", changed, 4 + 4 * i, value)
            if bytes(changed) != good:
                refused(bytes(changed)) if i != 5 or value else None
    for number in (np.nan, np.inf, -np.inf, 5.0):
        changed = bytearray(good)
        changed[header + 8 : header + 10] = np.float16(number).tobytes()
        assert "no log-probabilities" in refused(bytes(changed))
    # whatever bytes are changed: an error of ours, or a result
    dice = random.Random(0)
    for _ in range(30):
        changed = bytearray(good)
        for _ in range(dice.choice([1, 1, 4])):
            changed[dice.randrange(header + 600)] = dice.randrange(256)
        file.write_bytes(changed)
        with suppress(PellucidError):
            evaluate(plain, logits_file=file)


def test_a_run_that_does_not_end_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    plain = folder / "plain.gguf"
    with open_evaluation(
        plain,
        build_engine_config({}),
        TEXT,
        PROTOCOLS["papers"],
        n_ctx=600,
        chunks=3,
        base_path=plain,
        logits_file=tmp_path / "base",
    ) as evaluation:
        next(evaluation.run())
        assert evaluation.new_file_bytes == 128 + 3 * 599 * (8 + 2 * 261)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_the_disk_cannot_hold_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(CapacityError, match=r"would have .* bytes, and the disk has 1000 free"):
        saved(folder, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_a_text_or_a_window_that_is_too_short_is_refused(folder: Path) -> None:
    plain = folder / "plain.gguf"
    with open_model(plain) as model:
        for text, protocol, n_ctx, sentence in (
            ("short", "llama.cpp", 512, "the text has 5 tokens; .* needs at least 1024"),
            ("short", "papers", 2048, "the text has 5 tokens; .* needs at least 2048"),
            (TEXT, "llama.cpp", 7, "n_ctx is 7; it must be at least 8"),
        ):
            with pytest.raises(RequestError, match=sentence):
                cut_windows(model.tokenizer, text, PROTOCOLS[protocol], n_ctx)
        with pytest.raises(
            ConfigError, match=r"n_ctx is 4096; plain\.gguf sees at most 2048 tokens"
        ):
            Scorer(model, build_engine_config({}), 4096)


def test_logits_that_are_not_finite_are_one_sentence(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "broken.gguf", ffn=64, breaking=ord("c"))
    sound = write_tiny(tmp_path / "sound.gguf")
    for model, base in ((path, None), (path, sound), (sound, path)):
        with pytest.raises(RequestError, match="a logit is NaN or infinite"):
            evaluate(model, n_ctx=32, chunks=4, base_path=base)


# ---- the command


def test_the_command_names_the_protocol_and_gives_json(folder: Path, tmp_path: Path) -> None:
    arguments = ["perplexity", str(folder / "text"), "-m", str(folder / "plain.gguf")]
    done = CliRunner().invoke(main, [*arguments, "--n-ctx", "64", "--chunks", "4"])
    assert done.exit_code == 0
    assert "(protocol llama.cpp, 4 chunks of 64, 124 tokens scored)" in done.stdout
    more = ["--protocol", "papers", "--n-ctx", "64", "--json"]
    base = ["--kl-base", str(folder / "other.gguf"), "--logits-file", str(tmp_path / "base")]
    done = CliRunner().invoke(main, [*arguments, *more, *base])
    assert done.exit_code == 0 and f"{tmp_path / 'base'} will have" in done.stderr
    found = json.loads(done.stdout)
    assert (found["protocol"], found["n_ctx"], found["complete"]) == ("papers", 64, True)
    compared = found["divergence"]
    assert compared["base_name"] == "other.gguf" and compared["kl"]["value"] > 0
    assert compared["base"]["num_scored_tokens"] == found["num_scored_tokens"]
    done = CliRunner().invoke(
        main, [*arguments, *more[:2], "--logits-file", str(tmp_path / "base")]
    )
    assert done.exit_code == 0
    for line in ("beside the base", "KL divergence, nats", "same likeliest token", "Δp, mean"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"\x7fELF\x02\x01\x00" * 90, "has characters NUL"),
        (b"abc\xff" * 90, "is not UTF-8 text: byte 3 is wrong"),
        (b"abc", "the text has 3 tokens"),
    ],
)
def test_a_file_that_is_no_text_is_one_sentence(
    folder: Path, tmp_path: Path, data: bytes, sentence: str
) -> None:
    (tmp_path / "text").write_bytes(data)
    done = CliRunner().invoke(
        main, ["perplexity", str(tmp_path / "text"), "-m", str(folder / "plain.gguf")]
    )
    assert done.exit_code == 1 and sentence in done.stderr and done.stderr.count("\n") == 1


def test_ctrl_c_shows_what_is_known_so_far(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT * 400)
    terminal = Terminal(
        [*COMMAND, "perplexity", str(tmp_path / "text"), "-m", str(folder / "plain.gguf"),
         "--n-ctx", "500"]
    )  # fmt: skip
    try:
        terminal.wait_for(
            rb"[1-9][0-9]* of [0-9]+ chunks .* perplexity [0-9.]+ .* about [0-9:]+ left"
        )
        terminal.type(b"\x03")
        code, rest = terminal.wait_for_end()
    finally:
        terminal.close()
    assert code == 130 and b"Traceback" not in rest
    assert b"protocol llama.cpp" in rest and b"interrupted after" in rest


def test_options_of_drafts_are_refused_because_nothing_is_generated(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abc")
    result = CliRunner().invoke(main, ["perplexity", str(text), "--speculative", "ngram"])
    assert result.exit_code == 2 and "--speculative" in result.output
