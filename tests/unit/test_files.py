"""Files of strangers: only regular ones, only those of the model's folder, and no more of them than
a limit; JSON of strangers: bounded, and refused in one sentence.
"""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pellucid import files
from pellucid.cli.answers_file import AnswersFile
from pellucid.errors import FormatError
from pellucid.files import check_regular, open_regular, open_within, read_bytes, read_json

# ---- JSON


def write(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    return path


def test_an_object_is_read(tmp_path: Path) -> None:
    assert read_json(write(tmp_path, b'{"a": [1, 2.5, null, true, "x"]}'), 100) == {
        "a": [1, 2.5, None, True, "x"]
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a JSON object"),
        (b"{", "is not a JSON object"),
        (b'{"a": 1} trailing', "is not a JSON object"),
        (b"[1, 2]", "holds a list; it must hold a JSON object"),
        (b"3", "holds 3; it must hold a JSON object"),
        (b'{"a": 1, "a": 2}', "has a key twice"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "is not a JSON object"),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "is not a JSON object"),
        (b"[" * 500_000, "is not a JSON object"),
        (b'{"a": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\uDFFF": 1}', "half of a surrogate pair"),
        (b'{"a": ["\\ud83d\\ude42", "\\\\ud800"]}', None),
        (b'{"a": ' + b"[" * 63 + b"1" + b"]" * 63 + b"}", None),
        (b'{"a": ' + b"[" * 64 + b"1" + b"]" * 64 + b"}", "nested more than 64 levels"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not a JSON object"),
        (b'{"a": [' + b"[]," * 700_000 + b"1]}", "JSON with 1400002 commas and brackets"),
    ],
    ids=[
        "empty",
        "cut",
        "trailing",
        "list",
        "number",
        "twice",
        "nan",
        "infinity",
        "utf8",
        "deep",
        "deep-lists",
        "half-a-pair",
        "half-a-pair-as-key",
        "whole-pairs",
        "just-deep-enough",
        "too-deep",
        "digits",
        "many",
    ],
)
def test_what_is_not_a_sound_object_is_refused(
    tmp_path: Path, content: bytes, message: str | None
) -> None:
    path = write(tmp_path, content)
    if message is None:
        assert read_json(path, 1 << 22)
        return
    with pytest.raises(FormatError, match=message):
        read_json(path, 1 << 22)


def test_files_over_the_limit_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has 101 bytes; at most 100 are read"):
        read_json(write(tmp_path, b" " * 101), 100)


def test_a_file_without_a_size_of_its_own_is_bounded_too() -> None:
    with pytest.raises(FormatError, match="has 11 bytes; at most 10 are read"):
        read_bytes(Path("/proc/self/status"), 10)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        read_json(tmp_path / "config.json", 100)
    with pytest.raises(FormatError, match="cannot be read: "):
        check_regular(tmp_path / "a\0b")


# ---- regular files


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a folder", "a device"])
def test_only_a_regular_file_is_opened_and_nothing_is_waited_for(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    message = f"x is {kind}; it must be a regular file"
    for attempt in (
        lambda: check_regular(path),
        lambda: open_regular(path),
        lambda: open_within(tmp_path, "x"),
        lambda: read_bytes(path, 10),
    ):
        with pytest.raises(FormatError, match=message):
            attempt()


def test_a_pipe_that_takes_the_files_place_after_the_first_look_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr(files, "check_regular", lambda path: None)
    attempts: list[Callable[[], object]] = [
        lambda: open_regular(tmp_path / "x"),
        lambda: open_within(tmp_path, "x"),
    ]
    for attempt in attempts:
        with pytest.raises(FormatError, match="x is a pipe; it must be a regular file"):
            attempt()


# ---- the folder


def test_links_may_lead_anywhere_in_the_folder_and_nowhere_else(tmp_path: Path) -> None:
    model, outside = tmp_path / "model", tmp_path / "secret"
    (model / "sub").mkdir(parents=True)
    (model / "real").write_text("real")
    outside.write_text("secret")
    (model / "inner").symlink_to("sub/../real")
    (model / "sub" / "up").symlink_to("../real")
    for name in ("real", "inner", "sub/up"):
        with open_within(model, name) as file:
            assert file.read() == b"real"
    (model / "absolute").symlink_to(outside)
    (model / "relative").symlink_to("../secret")
    (model / "folder").symlink_to(tmp_path)
    (model / "twice").symlink_to("relative")
    for name in ("absolute", "relative", "folder/secret", "twice", "../secret"):
        with pytest.raises(FormatError, match="outside the model's folder"):
            open_within(model, name)
    with open_regular(model / "absolute") as file:  # a path that the user typed
        assert file.read() == b"secret"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "x").write_text("x")
    (tmp_path / "link").symlink_to("model")
    with open_within(tmp_path / "link", "x") as file:
        assert file.read() == b"x"


def test_links_of_a_hub_cache_stay_in_the_tree_of_their_repository(tmp_path: Path) -> None:
    for name in ("models--o--n", "models--o--other"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "abc").write_text(name)
    snapshot = tmp_path / "models--o--n" / "snapshots" / "0123"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "x").symlink_to("../../blobs/abc")
    (snapshot / "sub" / "x").symlink_to("../../../blobs/abc")
    (snapshot / "y").symlink_to("../../../models--o--other/blobs/abc")
    for name in ("x", "sub/x"):
        with open_within(snapshot, name) as file:
            assert file.read() == b"models--o--n"
    with open_within(snapshot / "sub", "x") as file:
        assert file.read() == b"models--o--n"
    digest = "ab" * 32
    (tmp_path / "blobs" / "ab").mkdir(parents=True)
    (tmp_path / "blobs" / "ab" / digest).write_text("shared")
    (tmp_path / "blobs" / "secret").write_text("secret")
    (tmp_path / "models--o--n" / "blobs" / "z").symlink_to(f"../../blobs/ab/{digest}")
    (snapshot / "z").symlink_to("../../blobs/z")
    (snapshot / "w").symlink_to("../../../blobs/secret")
    with open_within(snapshot, "z") as file:
        assert file.read() == b"shared"
    for name in ("y", "w"):
        with pytest.raises(FormatError, match="outside the model's folder"):
            open_within(snapshot, name)


def test_a_link_that_is_put_there_after_links_were_resolved_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (model / "sub" / "x").write_text("x")

    def swap(at: Path, target: Path) -> None:
        resolve = os.path.realpath

        def racing(path: Path) -> str:
            found = resolve(path)
            if str(path).endswith("x") and not at.is_symlink():
                at.rename(tmp_path / f"moved-{at.name}")
                at.symlink_to(target)
            return str(found)

        monkeypatch.setattr(os.path, "realpath", racing)

    swap(model / "sub" / "x", tmp_path / "secret")
    with pytest.raises(FormatError, match="cannot be read: "):
        open_within(model, "sub/x")
    (model / "sub" / "x").unlink()
    (model / "sub" / "x").write_text("x")
    monkeypatch.undo()
    (tmp_path / "x").write_text("secret")
    swap(model / "sub", tmp_path)
    with pytest.raises(FormatError, match="cannot be read: "):
        open_within(model, "sub/x")


def test_opening_leaves_no_descriptor_open(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_text("x")
    os.mkfifo(tmp_path / "sub" / "pipe")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        open_within(tmp_path, "sub/x").close()
        for name in ("sub/pipe", "sub/none", "../none"):
            with pytest.raises(FormatError):
                open_within(tmp_path, name)
    assert len(os.listdir("/dev/fd")) == before


def test_a_continued_file_of_answers_is_on_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def fsync(fd: int) -> None:
        sync(fd)
        done.append(("fsync", os.fstat(fd).st_ino))

    def replace(source: Path, target: Path) -> None:
        done.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    path = tmp_path / "answers.jsonl"
    path.write_text('{"line": 1, "outputs": []}\n{"line": 2, "error": "no"}\n')
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with AnswersFile(path, None, overwrite=False):
        file, folder = path.stat().st_ino, tmp_path.stat().st_ino
        assert done == [("fsync", file), ("rename", file), ("fsync", folder)]
