"""A live server over the tiny random model, and one over SmolLM2 where real models are at hand.

Each server is a process of its own, started as a user starts it: `pellucid serve`.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the server needs the extra 'server'")
pytest.importorskip("openai", reason="the server is tested with OpenAI's client")

import openai

from tests.engine.conftest import write_tiny

START_SECONDS = 300  # on a busy machine


@dataclass
class Server:
    """A running server."""

    url: str  # without a path
    process: subprocess.Popen[str]
    log: Path
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, **options: object) -> openai.OpenAI:
        """OpenAI's own client, which tries once. It is closed with the server."""
        fields = {"api_key": "none", "max_retries": 0, "timeout": START_SECONDS} | options
        client = openai.OpenAI(base_url=f"{self.url}/v1", **fields)  # type: ignore[arg-type]
        self.clients.append(client)
        return client


@contextlib.contextmanager
def serving(
    model: Path,
    log: Path,
    *options: str,
    preexec_fn: Callable[[], None] | None = None,
    program: Sequence[str] = ("-m", "pellucid"),
) -> Iterator[Server]:
    """`pellucid serve` at a free port, until the block ends. `program`: Python's options."""
    command = [sys.executable, *program, "serve", str(model), "--port", "0", *options]
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, stderr=stderr, text=True, env={**os.environ}, preexec_fn=preexec_fn
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (found := re.search(r"API +(http\S+)/v1", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        running = Server(found[1], process, log)
        yield running
        for client in running.clients:
            client.close()
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with a chat template."""
    return write_tiny(tmp_path_factory.mktemp("tiny-server") / "tiny.gguf", context=2048)


@pytest.fixture(scope="session")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The tiny model, named "tiny"."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(tiny_model, log, "--served-model-name", "tiny") as running:
        yield running


@pytest.fixture(scope="session")
def smol(
    real_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """SmolLM2 135M, named "smol"."""
    log = tmp_path_factory.mktemp("log") / "smol.log"
    path = real_model("smollm2-135m-instruct-q4_1")
    with serving(path, log, "--served-model-name", "smol") as running:
        yield running


@pytest.fixture(scope="session")
def endless_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers end at max_tokens alone. 400,000 tokens take minutes on the
    fastest machine, so that a test never finds a request ended before its time.
    """
    folder = tmp_path_factory.mktemp("endless-model")
    return write_tiny(folder / "endless.gguf", context=1 << 19, ends=False)


@contextlib.contextmanager
def serving_endless(model: Path, log: Path, *options: str) -> Iterator[Server]:
    """`endless_model` with room for several endless answers, named "tiny"."""
    memory = ("--max-model-len", "500000", "--kv-cache-memory", str(1 << 28))
    with serving(model, log, "--served-model-name", "tiny", *memory, *options) as running:
        yield running


@pytest.fixture(scope="session")
def endless(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of endless answers, open to all."""
    log = tmp_path_factory.mktemp("endless") / "server.log"
    with serving_endless(endless_model, log) as running:
        yield running


@pytest.fixture(scope="session")
def locked(endless_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of endless answers behind the API key "secret"."""
    log = tmp_path_factory.mktemp("locked") / "server.log"
    with serving_endless(endless_model, log, "--api-key", "secret") as running:
        yield running
