"""Reading JSON of strangers: bounded, and refused in one sentence."""

from pathlib import Path

import pytest

from pellucid.errors import FormatError
from pellucid.weights.fields import read_json


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
        (b'{"a": ' + b"9" * 5000 + b"}", "is not a JSON object"),
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
        "digits",
    ],
)
def test_what_is_not_a_sound_object_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        read_json(write(tmp_path, content), 1 << 20)


def test_files_over_the_limit_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="has 101 bytes; at most 100 are read"):
        read_json(write(tmp_path, b" " * 101), 100)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="cannot be read: No such file"):
        read_json(tmp_path / "config.json", 100)
