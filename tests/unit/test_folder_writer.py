"""Folders of safetensors files: read by the library itself, in parts, whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pellucid.errors import ConfigError
from pellucid.formats.tensor import TensorSpec
from pellucid.weights.folder_writer import FolderWriter, check_target

SPECS = {
    "a": TensorSpec("I8", (3, 5)),
    "b": TensorSpec("F32", (4, 2)),
    "c": TensorSpec("I64", (2,)),
    "d": TensorSpec("F16", (7,)),
    "e": TensorSpec("I32", (2, 3)),
}
DTYPES = {"I8": np.int8, "F32": np.float32, "I64": np.int64, "F16": np.float16, "I32": np.int32}


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {n: rng.integers(-9, 9, s.shape).astype(DTYPES[s.format]) for n, s in SPECS.items()}


@pytest.mark.parametrize("limit", [1 << 30, 40, 1])
def test_safetensors_reads_the_folder(limit: int, tmp_path: Path) -> None:
    expected = arrays()
    with FolderWriter(tmp_path / "out", SPECS, limit) as writer:
        for name in reversed(SPECS):  # in any order
            writer.write(name, expected[name])
        writer.write_file("config.json", b"{}")
        writer.write_file("more/one.jinja", b"x")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {1 << 30: 1, 40: 4, 1: 5}[limit]
    found = {name: array for file in files for name, array in load_file(file).items()}
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.array_equal(found[name], array) and found[name].dtype == array.dtype
    if len(files) > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in expected.values())
        for name, file in index["weight_map"].items():
            assert name in load_file(tmp_path / "out" / file)
    assert (tmp_path / "out" / "more" / "one.jinja").read_bytes() == b"x"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    check_target(tmp_path / "out", 100)
    with FolderWriter(tmp_path / "out", {"a": TensorSpec("I8", (1,))}) as writer:
        writer.write("a", np.zeros(1, np.int8))
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_when_it_is_broken_off(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), FolderWriter(tmp_path / "out", SPECS) as writer:
        writer.write("a", arrays()["a"])
        raise error
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_was_not_written_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="4 tensors were not written"),
        FolderWriter(tmp_path / "out", SPECS) as writer,
    ):
        writer.write("a", arrays()["a"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("step", ["pwrite", "fsync", "mkdir", "rename"])
def test_a_full_disk_is_one_sentence(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    where = Path if step in ("mkdir", "rename") else os
    monkeypatch.setattr(where, step, fail)
    specs = {"a": TensorSpec("I8", (1,))}
    with (
        pytest.raises(ConfigError, match="out cannot be written: No space left"),
        FolderWriter(tmp_path / "out", specs) as writer,
    ):
        writer.write("a", np.zeros(1, np.int8))
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(ConfigError, match="not empty"):
        check_target(tmp_path / "full", 1)
    with pytest.raises(ConfigError, match="which is a file"):
        check_target(tmp_path / "full" / "x", 1)
    with pytest.raises(ConfigError, match="there is no folder"):
        check_target(tmp_path / "none" / "out", 1)
    with pytest.raises(ConfigError, match=r"free \d+ first"):
        check_target(tmp_path / "out", 1 << 60)
