"""schemathesis sends what the API's own description allows, and what it does not: no 500."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.server.conftest import Server

pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.mark.slow
def test_no_request_is_a_fault_of_the_server(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    command += ["--checks", "not_a_server_error", "--phases", "examples,coverage,fuzzing"]
    command += ["--max-examples", "40", "--seed", "1", "--no-color", "--request-timeout", "600"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert found.returncode == 0, found.stdout[-5000:]
    assert "Traceback" not in server.log.read_text()
