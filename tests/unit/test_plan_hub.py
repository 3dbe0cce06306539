"""A plan of a model of the hub fetches its config.json and nothing else: the real client, against a
hub on the loopback interface.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import urlsplit

import pytest

import pellucid

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


class _Handler(http.server.BaseHTTPRequestHandler):
    """One repository, org/plain, which holds a config.json; org/gguf is there and has none."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        found = path == "/org/plain/resolve/main/config.json"
        missing = "EntryNotFound" if path.startswith("/org/gguf/") else "RepoNotFound"
        self.send_response(200 if found else 404)
        content = CONFIG if found else b"{}"
        headers = {"ETag": '"1"', "X-Repo-Commit": "0" * 40} if found else {"X-Error-Code": missing}
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

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


@pytest.mark.parametrize(
    "name, sentence",
    [
        ("org/gguf", "org/gguf has no config.json on the hub; `pellucid pull org/gguf` brings"),
        ("org/missing", "config.json of org/missing could not be fetched"),
    ],
)
def test_what_the_hub_does_not_have_is_told_in_one_sentence(
    endpoint: str, tmp_path: Path, name: str, sentence: str
) -> None:
    done = plan(name, endpoint, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert sentence in line
