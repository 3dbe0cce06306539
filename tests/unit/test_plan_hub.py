"""A plan of a model of the hub fetches its config.json or the header of its GGUF file, and nothing
else: the real client, against a hub on the loopback interface.
"""

import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

import pellucid

from ..engine.conftest import write_tiny

pytestmark = pytest.mark.slow  # each test starts a server and a process

CONFIG = json.dumps(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "float16",
        "vocab_size": 320,
        "max_position_embeddings": 128,
    }
).encode()


# a header of 2 MB, most of it the names of tokens, before 10 MB of weights
GGUF_TOKENS = 80_000
FILE = "tiny-Q8_0.gguf"


class _Handler(http.server.BaseHTTPRequestHandler):
    """org/plain holds a config.json, org/gguf and org/whole a GGUF file; org/whole serves no parts
    of it. Any other repository is not there.
    """

    asked: ClassVar[list[str]] = []
    gguf: ClassVar[bytes] = b""
    sent = 0  # of all requests

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        if path == "/org/plain/resolve/main/config.json":
            self._send(200, CONFIG)
        elif path in ("/api/models/org/plain", "/api/models/org/gguf", "/api/models/org/whole"):
            name = path.removeprefix("/api/models/")
            file = "config.json" if name == "org/plain" else FILE
            self._send(200, json.dumps({"id": name, "siblings": [{"rfilename": file}]}).encode())
        elif path in (f"/org/gguf/resolve/main/{FILE}", f"/org/whole/resolve/main/{FILE}"):
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or path.startswith("/org/whole/"):
                self._send(200, self.gguf)
            else:
                self._send(206, self.gguf[int(wanted[1]) : int(wanted[2]) + 1])
        else:
            is_here = path.startswith(("/org/gguf/", "/org/whole/"))
            self._send(404, b"{}", "EntryNotFound" if is_here else "RepoNotFound")

    def _send(self, status: int, content: bytes, error: str = "") -> None:
        self.send_response(status)
        headers = {"X-Error-Code": error} if error else {"ETag": '"1"', "X-Repo-Commit": "0" * 40}
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # a client that has seen enough
                for start in range(0, len(content), 1 << 16):
                    piece = content[start : start + (1 << 16)]
                    self.wfile.write(piece)
                    type(self).sent += len(piece)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def plan(name: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(Path(pellucid.__file__).parents[1]),
    }
    command = [sys.executable, "-m", "pellucid", "plan", name, "--hardware", "h100"]
    return subprocess.run(
        command, env=kept | own, capture_output=True, text=True, timeout=600, check=False
    )


def test_only_the_config_is_fetched(endpoint: str, tmp_path: Path) -> None:
    _Handler.asked.clear()
    done = plan("org/plain", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "MHA: 2 (key and value) · 2 layers · 4 KV heads · 16 numbers" in done.stdout
    fetched = {path for path in _Handler.asked if "/resolve/" in path}
    assert fetched == {"/org/plain/resolve/main/config.json"}


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_tiny(tmp_path_factory.mktemp("hub") / FILE, padding=GGUF_TOKENS)
    _Handler.gguf = path.read_bytes()
    return path


@pytest.mark.parametrize("name", ["org/gguf", "org/gguf:Q8_0", f"org/gguf/{FILE}"])
def test_of_a_gguf_file_the_header_alone_comes(
    endpoint: str, tmp_path: Path, gguf: Path, name: str
) -> None:
    _Handler.sent = 0
    done = plan(name, endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(_Handler.gguf) > 12e6 and _Handler.sent < 4e6
    here = plan(str(gguf), endpoint, tmp_path)
    assert done.stdout.replace(f"org/gguf/{FILE}", str(gguf)) == here.stdout


def test_a_server_that_serves_no_parts_is_told_and_not_read(
    endpoint: str, tmp_path: Path, gguf: Path
) -> None:
    done = plan("org/whole:Q8_0", endpoint, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.endswith(f"org/whole/{FILE} comes only as a whole: its server does not serve parts")


def test_without_a_network_one_sentence_says_so(tmp_path: Path) -> None:
    for name in ("org/plain", "org/gguf:Q8_0"):
        done = plan(name, "http://127.0.0.1:9", tmp_path)
        assert done.returncode == 1
        (line,) = done.stderr.strip().splitlines()
        assert "is not in the Hugging Face cache and could not be fetched" in line


def test_a_model_of_the_catalogue_that_is_not_here_is_not_fetched(
    endpoint: str, tmp_path: Path
) -> None:
    done = plan("smollm2-135m-instruct", endpoint, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert "`pellucid pull smollm2-135m-instruct` fetches its 98 MB" in line


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("org/gguf:Q4_0", f"has no GGUF file of Q4_0; its GGUF files are {FILE}"),
        ("org/missing", "the Hugging Face hub has no model 'org/missing'"),
        ("org/missing:Q4_0", "the Hugging Face hub has no model 'org/missing'"),
    ],
)
def test_what_the_hub_does_not_have_is_told_in_one_sentence(
    endpoint: str, tmp_path: Path, name: str, sentence: str
) -> None:
    done = plan(name, endpoint, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line
