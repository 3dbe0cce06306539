"""Opening and reading untrusted files, within bounds.

Three rules apply to every file that a user names or that lies in a model's folder:

- It is a regular file. A FIFO, a socket, a device or a folder is refused and never waited for.
- A file of a model's folder lies in that folder. A link may lead to another file of the folder. In
  a Hugging Face cache it may also lead to `models--ORG--NAME/{snapshots,blobs}`, the tree of its
  repository, and to the cache's shared `blobs/`: that is how the cache stores files.
- No more is read than a limit, and JSON is bounded in size, number of values and depth.

A path that a user types may be a link to anywhere: `open_regular` follows it. Sizes are in bytes.
Every error is a FormatError with one sentence.
"""

import io
import json
import os
import re
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn, Self

from .errors import ConfigError, FormatError

__all__ = [
    "Closing",
    "PartialFile",
    "check_output",
    "check_regular",
    "files_of",
    "is_there",
    "open_regular",
    "open_within",
    "parse_json",
    "publish",
    "read_at",
    "read_bytes",
    "read_json",
    "size_of",
    "sync",
    "unread",
]

MAX_JSON_DEPTH = 64  # real files have about ten levels
MAX_JSON_VALUES = 1 << 20  # commas and brackets of one file, unless the caller allows more
_MAX_READ = 1 << 30  # of one call: Linux gives up to 2 GiB at a time
_LARGE_READ = 32 << 20  # from here on, threads share a read
_READERS = 4

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str | os.PathLike[str]) -> None:
    """Raise FormatError unless `path` is, or is a link to, a regular file. Opens nothing."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL character
        _refuse(path, error)
    _check_mode(path, mode)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file that a user named, for reading. Links are followed."""
    check_regular(path)  # before opening, because opening a device or a pipe may have effects
    with _readable(path):
        return _checked(path, os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))


def open_within(folder: Path, name: str | Path) -> BinaryIO:
    """Open the file `name` of a model's folder, for reading. `name` may have folders in it.

    The links of the path are resolved first. The result is then opened from the allowed folder
    downwards, one step at a time, following no further link. So a link that is created in between
    is refused too.
    """
    path = folder / name
    check_regular(path)
    with _readable(path):
        root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
        if not _is_allowed(root, target):
            raise FormatError(
                f"{path} leads to {target}, outside the model's folder; only files in the folder "
                "are opened"
            )
        base = Path(os.path.commonpath([root, target]))
        *folders, last = target.relative_to(base).parts
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for part in folders:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                outer, fd = fd, os.open(part, flags, dir_fd=fd)
                os.close(outer)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return _checked(path, os.open(last, flags, dir_fd=fd))
        finally:
            os.close(fd)


def check_output(path: Path, inputs: Iterable[Path] = ()) -> None:
    """Raise ConfigError unless a new file can be put at `path`, where at most a regular file may be
    that is none of the `inputs`. For work that takes long and writes at its end.
    """
    if path.exists():
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
            raise ConfigError(f"out is {str(path)!r}, which is {kind}; give the name of a file")
        if any(other.exists() and os.path.samefile(path, other) for other in inputs):
            raise ConfigError(f"out is {str(path)!r}, which is read; give another name")
    folder = path.parent
    if not folder.is_dir():
        raise ConfigError(f"out is {str(path)!r}; there is no folder {str(folder)!r}")
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=effective):
        raise ConfigError(f"out is {str(path)!r}; the folder {str(folder)!r} cannot be written to")


def files_of(model: Path) -> list[Path]:
    """A model's file, or the files in its folder."""
    if not model.is_dir():
        return [model]
    return [path for path in model.iterdir() if path.is_file()]


def is_there(path: Path) -> bool:
    """Whether the folder has an entry of this name, of any kind; a broken link counts."""
    try:
        return os.path.lexists(path)
    except ValueError:
        return False


class Closing(ABC):
    """Has files to close: `with` closes them at its end."""

    @abstractmethod
    def close(self) -> None:
        """Close the files. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class PartialFile(io.FileIO):
    """A file of which only some parts are here yet. `read_at` brings the part that it reads."""

    def need(self, offset: int, count: int) -> None:
        """Bring the bytes from `offset`. Raises a PellucidError if they cannot be had."""
        raise NotImplementedError


def size_of(file: BinaryIO) -> int:
    """The size of an open file, as it is now."""
    return os.fstat(file.fileno()).st_size


def read_at(file: BinaryIO, offset: int, into: memoryview, what: str) -> None:
    """Fill the bytes of `into` from `offset` of an open file. `what` names them in an error.

    The bytes are copied into the caller's memory, not mapped. If the file is cut short or the disk
    fails meanwhile, that is an error and not a signal that ends the process.

    Large reads are divided among a few threads, because page faults of new memory take as long as
    the copy.
    """
    if isinstance(file, PartialFile):
        file.need(offset, len(into))
    if len(into) >= _LARGE_READ:
        from concurrent.futures import ThreadPoolExecutor

        share = -(-len(into) // _READERS)
        starts = range(0, len(into), share)
        with ThreadPoolExecutor(_READERS) as pool:
            parts = [
                pool.submit(_read_part, file, offset + start, into[start : start + share], what)
                for start in starts
            ]
        for part in parts:
            part.result()
    else:
        _read_part(file, offset, into, what)


def _read_part(file: BinaryIO, offset: int, into: memoryview, what: str) -> None:
    done = 0
    while done < len(into):
        try:
            count = os.preadv(file.fileno(), [into[done : done + _MAX_READ]], offset + done)
        except OSError as error:
            raise unread(file, offset + done, what, error) from error
        if count == 0:
            raise unread(file, offset + done, what)
        done += count


def unread(file: BinaryIO, offset: int, what: str, error: OSError | None = None) -> FormatError:
    """The error for bytes that could not be read: for `error`, or because the file ends before
    them.
    """
    where = f"{file.name}: {what}, at offset {offset},"
    if error is not None:
        return FormatError(f"{where} cannot be read: {error.strerror}")
    return FormatError(
        f"{where} is missing: the file ends after {size_of(file)} bytes; it was cut short while it "
        "was read, or its copy is incomplete"
    )


def read_bytes(path: Path, max_bytes: int, *, within: Path | None = None) -> bytes:
    """All of a file of at most `max_bytes`. `within`: the model's folder in which it must lie."""
    opened = open_regular(path) if within is None else open_within(within, path.relative_to(within))
    with opened as file, _readable(path):
        size = size_of(file)
        # one byte more than allowed: a file may grow, or report no size (/proc)
        data = b"" if size > max_bytes else file.read(max_bytes + 1)
    if max(size, len(data)) > max_bytes:
        raise FormatError(f"{path} has {max(size, len(data))} bytes; at most {max_bytes} are read")
    return data


def read_json(
    path: Path, max_bytes: int, *, within: Path | None = None, max_values: int = MAX_JSON_VALUES
) -> dict[str, object]:
    """The JSON object in a file of at most `max_bytes`. `within`: the folder in which it lies."""
    data = read_bytes(path, max_bytes, within=within)
    return parse_json(data, str(path), max_values=max_values)


def publish(scratch: Path, path: Path) -> None:
    """Give the complete file `scratch` its final name `path`, on the same disk.

    Its bytes reach the disk before the name, and the name before this returns. So after a crash of
    the machine there is the old file or the new one, never a part. Raises OSError.
    """
    sync(scratch)
    os.replace(scratch, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def parse_json(
    text: bytes, where: str, *, max_values: int = MAX_JSON_VALUES, any_text: bool = False
) -> dict[str, object]:
    """The JSON object in `text`. `where` begins every message.

    Raises FormatError for keys given twice, NaN, infinity, more than `max_values` values, nesting
    of more than MAX_JSON_DEPTH levels, and halves of surrogate pairs in texts. `any_text`: the
    caller checks texts itself.
    """
    # count before parsing: a list of empty lists takes twenty times the memory of its text
    if (count := sum(map(text.count, (b",", b"[", b"{")))) > max_values:
        raise FormatError(
            f"{where} is JSON with {count} commas and brackets; at most {max_values} are read"
        )
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where} is not a JSON object that can be read: {error}") from error
    if not isinstance(value, dict):
        shown = "a list" if isinstance(value, list) else f"{value!r:.60}"
        raise FormatError(f"{where} holds {shown}; it must hold a JSON object")
    _check_depth(value, where)
    # half of a surrogate pair is no character, and UTF-8 and Rust have no place for it
    if not any_text and re.search(rb"\\u[dD][89a-fA-F]", text) and not _is_unicode(value):
        raise FormatError(f"{where} has a text with half of a surrogate pair, which is no Unicode")
    return value


# ---- which files may be opened


def _is_allowed(root: Path, target: Path) -> bool:
    """Whether a file of the model in `root` may lie at `target`. Both are without links."""
    if target.is_relative_to(root):
        return True
    for parent in root.parents if root.name != "snapshots" else (root, *root.parents):
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            repository = parent.parent
            # newer caches also share one store among repositories: blobs/<2 hex>/<64 hex>
            shared = target.parent.parent == repository.parent / "blobs"
            return (
                target.is_relative_to(parent)
                or target.is_relative_to(repository / "blobs")
                or (shared and re.fullmatch("[0-9a-f]{64}", target.name) is not None)
            )
    return False


def _checked(path: str | os.PathLike[str], fd: int) -> BinaryIO:
    """The file of `fd`, if it is a regular file. `fd` is closed with it, or at once if it is
    not.
    """
    try:
        _check_mode(path, os.fstat(fd).st_mode)
        os.set_blocking(fd, True)
    except BaseException:
        os.close(fd)
        raise
    # the path is the file's name in messages; the opener returns the open descriptor
    return open(path, "rb", opener=lambda *_: fd)


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no regular file")
        raise FormatError(f"{os.fspath(path)} is {kind}; it must be a regular file")


@contextmanager
def _readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an error of the operating system into a FormatError of one sentence."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        _refuse(path, error)


def _refuse(path: str | os.PathLike[str], error: Exception) -> NoReturn:
    reason = error.strerror or error if isinstance(error, OSError) else error
    raise FormatError(f"{os.fspath(path)} cannot be read: {reason}") from error


# ---- JSON


def _check_depth(value: object, where: str) -> None:
    """Check the depth level by level, without recursion."""
    containers = (dict, list)
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > MAX_JSON_DEPTH:
            raise FormatError(f"{where} is JSON nested more than {MAX_JSON_DEPTH} levels deep")
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)  # type: ignore[attr-defined]
            if isinstance(inner, containers)
        ]


def _is_unicode(value: object) -> bool:
    """Whether UTF-8 can encode all texts of a JSON value."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _refuse_constant(name: str) -> object:
    raise ValueError(f"{name} is not a JSON number")
