"""Each example of docs/server.md does what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import Server

PAGE = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
CURLS = [code for code in re.findall(r"```sh\n(.*?)```", PAGE, re.S) if code.startswith("curl")]
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.S)
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.parametrize("code", CURLS)
def test_a_curl_line_is_answered(smol: Server, code: str) -> None:
    command = code.replace(ADDRESS, smol.url).replace("curl ", "curl -sS --fail-with-body ", 1)
    found = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=False, cwd="/"
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert '"choices"' in found.stdout and '"timings"' in found.stdout


@pytest.mark.parametrize("code", PROGRAMS)
def test_a_program_prints_an_answer(smol: Server, code: str) -> None:
    command = [sys.executable, "-c", code.replace(ADDRESS, smol.url)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


def test_every_option_on_the_page_is_one_of_the_command() -> None:
    command = [sys.executable, "-m", "pellucid", "serve", "--help"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    options = set(re.findall(r"`(--[a-z-]+)", PAGE))
    assert len(options) > 20 and all(option in told for option in options)


def test_every_route_on_the_page_is_one_of_the_server(smol: Server) -> None:
    rows = re.findall(r"^\| `(?:GET|POST) (.*?)` \|", PAGE, re.M)
    paths = [path for row in rows for path in re.findall(r"/[\w/.]*", row)]
    schema = smol.client().with_options(base_url=smol.url).get("/openapi.json", cast_to=object)
    known = {*schema["paths"], "/", "/docs", "/openapi.json"}  # type: ignore[index]
    assert len(paths) > 15 and set(paths) <= known
