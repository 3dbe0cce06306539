"""Random damage to a sound GGUF file: it is read, or refused by a `PellucidError`; nothing else
happens, and memory stays bounded.
"""

import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pellucid.errors import PellucidError

from .gguf_corpus import HUGE, SOUND
from .test_gguf import read_all

pytestmark = pytest.mark.slow  # thousands of damaged files

POSITIONS = st.integers(0, len(SOUND) - 1)
NUMBERS = st.sampled_from(
    (0, 1, 2, 31, 255, 1 << 16, 1 << 24, 1 << 31, 1 << 32, 1 << 61, 1 << 63, HUGE)
) | st.integers(0, HUGE)

# Each damage is a function of the bytes: (kind, where, what).
FLIP = st.tuples(st.just("flip"), POSITIONS, st.integers(1, 255))
CUT = st.tuples(st.just("cut"), POSITIONS, st.just(0))
# a 64-bit number written over what was there
CLAIM = st.tuples(st.just("claim"), POSITIONS, NUMBERS)
# bytes from elsewhere in the file pushed in
INSERT = st.tuples(st.just("insert"), POSITIONS, st.integers(1, 64))
REMOVE = st.tuples(st.just("remove"), POSITIONS, st.integers(1, 64))
Damage = tuple[str, int, int]


def damage(content: bytes, damages: list[Damage]) -> bytes:
    """The bytes after all of these, one after another."""
    for kind, where, what in damages:
        where = min(where, len(content))
        if kind == "flip" and where < len(content):
            content = content[:where] + bytes([content[where] ^ what]) + content[where + 1 :]
        elif kind == "cut":
            content = content[:where]
        elif kind == "claim":
            content = content[:where] + struct.pack("<Q", what) + content[where + 8 :]
        elif kind == "insert":
            source = where * 7919 % len(SOUND)
            content = content[:where] + SOUND[source : source + what] + content[where:]
        elif kind == "remove":
            content = content[:where] + content[where + what :]
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=500, deadline=None, derandomize=True)
@given(damages=st.lists(FLIP | CLAIM | INSERT | REMOVE | CUT, min_size=1, max_size=4))
def test_a_damaged_file_is_read_or_refused(folder: Path, damages: list[Damage]) -> None:
    content = damage(SOUND, damages)
    tracemalloc.start()
    try:
        read_all(folder, content)
        event("read")
    except PellucidError:
        event("refused")
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 20, f"{peak} bytes for a file of {len(content)}"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(content=st.binary(max_size=400), counts=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_random_bytes_after_a_sound_beginning_are_read_or_refused(
    folder: Path, content: bytes, counts: tuple[int, int]
) -> None:
    try:
        read_all(folder, b"GGUF" + struct.pack("<IQQ", 3, *counts) + content)
    except PellucidError:
        event("refused")
