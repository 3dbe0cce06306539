"""Paths behind a proxy, with its prefix or without it, and HTTPS without a proxy."""

import json
import shutil
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Server, serving


@pytest.fixture(scope="module")
def prefixed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("prefixed") / "server.log"
    options = ("--served-model-name", "tiny", "--root-path", "/llm", "--api-key", "secret")
    with serving(tiny_model, log, *options) as running:
        yield running


def send(
    url: str, body: Any = None, context: ssl.SSLContext | None = None, key: str = "secret"
) -> tuple[int, Any]:
    """Status and JSON of an answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", "authorization": f"Bearer {key}"}
    asked = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(asked, context=context) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


@pytest.mark.parametrize("prefix", ["", "/llm"])
def test_paths_have_the_prefix_or_not(prefixed: Server, prefix: str) -> None:
    url = prefixed.url + prefix
    assert send(f"{url}/v1/models")[1]["data"][0]["id"] == "tiny"
    assert send(f"{url}/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200
    # Errors keep the form of their route, and the same paths are open.
    status, body = send(f"{url}/v1/messages", {"messages": []})
    assert status == 400 and body["type"] == "error"
    assert send(f"{url}/health", key="wrong")[0] == 200
    assert send(f"{url}/v1/models", key="wrong")[0] == 401
    assert send(f"{url}/metrics", key="wrong")[0] == 401
    assert send(f"{url}/openapi.json")[1]["servers"] == [{"url": "/llm"}]


def test_https_is_served(tiny_model: Path, tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("a certificate is made by openssl, which is not installed")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    made += ["-keyout", str(key), "-out", str(certificate), "-subj", "/CN=127.0.0.1"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(made, check=True, capture_output=True)
    options = ("--ssl-certfile", str(certificate), "--ssl-keyfile", str(key))
    with serving(tiny_model, tmp_path / "log", "--served-model-name", "tiny", *options) as running:
        assert running.url.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        body = {"prompt": "a", "max_tokens": 2}
        assert send(f"{running.url}/v1/completions", body, context)[0] == 200
