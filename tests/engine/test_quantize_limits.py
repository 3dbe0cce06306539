"""Limits that `pellucid quantize` meets for real: a disk that is full, a signal in the middle. In a
process of its own, which can be stopped and limited.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..models.folders import write_folder

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "head_dim": 64,
    "num_hidden_layers": 3,
}
KINDS = ("q8_0", "int8")  # a GGUF file, a folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model") / "qwen2", "qwen2", "float32", **SIZES)


def quantize(model: Path, out: Path, kind: str, limit: int | None = None) -> tuple[int, str]:
    """Run the command: (its exit code, what it said). `limit`: bytes that a file may have."""

    def restrict() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-m", "pellucid", "quantize", str(model), str(out), "--to", kind],
        preexec_fn=restrict,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_grow_is_one_sentence_and_leaves_nothing(
    kind: str, model: Path, tmp_path: Path
) -> None:
    code, said = quantize(model, tmp_path / "out", kind, limit=300_000)
    assert code == 1 and "cannot be written: File too large" in said, said
    assert "Traceback" not in said and not list(tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 512 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    command = [mount, "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this machine does not allow to mount a small disk")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    kind: str, model: Path, small_disk: Path
) -> None:
    code, said = quantize(model, small_disk / "out", kind)
    assert code == 1 and "its disk has" in said, said
    assert "Traceback" not in said and not list(small_disk.iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_in_the_middle_leaves_nothing(kind: str, tmp_path: Path) -> None:
    wide = {**SIZES, "vocab_size": 200_000, "num_hidden_layers": 2}
    model = write_folder(tmp_path / "qwen2", "qwen2", "float32", **wide)
    place = tmp_path / "place"
    place.mkdir()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pellucid",
            "quantize",
            str(model),
            str(place / "out"),
            "--to",
            kind,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list(place.iterdir()):
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "Traceback" not in said and not list(place.iterdir())
