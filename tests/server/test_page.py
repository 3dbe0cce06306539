"""The files of the page at `/`, and GET /debug/stats which feeds it, over HTTP."""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import Server

HELLO: Any = [{"role": "user", "content": "Hi"}]
STATIC = Path(__file__).parents[2] / "src" / "pellucid" / "server" / "static"


class Response(NamedTuple):
    """What a server answered."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


def fetch(url: str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Response:
    """Send a request without a body."""
    request = urllib.request.Request(url, headers=dict(headers or {}), method=method)
    try:
        with urllib.request.urlopen(request) as found:
            return Response(found.status, dict(found.headers.items()), found.read())
    except urllib.error.HTTPError as error:
        with error:
            return Response(error.code, dict(error.headers.items()), error.read())


def test_every_file_is_sent_with_its_type_and_without_a_key(locked: Server) -> None:
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
    for file in STATIC.iterdir():
        path = "/" if file.name == "index.html" else f"/static/{file.name}"
        response = fetch(locked.url + path)
        assert (response.status, response.body) == (200, file.read_bytes())
        kind = response.headers["content-type"].partition(";")[0]
        assert kind == types.get(file.suffix, "image/svg+xml")
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert response.headers["x-content-type-options"] == "nosniff"
        again = fetch(locked.url + path, {"if-none-match": response.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
        assert fetch(locked.url + path, method="HEAD").status == 200
    for path in ("/static/", "/static/..%2fpage.py", "/static/../page.py", "/static/none.js"):
        assert fetch(locked.url + path).status in (401, 404)


def test_the_files_name_no_other_host_and_no_inline_script() -> None:
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//cdn|@import|innerHTML|insertAdjacentHTML|eval\(", text)
        assert not re.search(r"\son\w+=|style=|<script>", text)
        assert max(map(len, text.splitlines())) <= 100 and len(text.splitlines()) <= 500


def test_stats_need_the_key_and_move(locked: Server) -> None:
    assert fetch(f"{locked.url}/debug/stats").status == 401
    headers = {"authorization": "Bearer secret"}
    before = fetch(f"{locked.url}/debug/stats", headers).json()
    client = locked.client(api_key="secret")
    client.completions.create(model="tiny", prompt="abc", max_tokens=20)
    after = fetch(f"{locked.url}/debug/stats", headers).json()
    assert after["model"] == "tiny" and after["time"] > before["time"]
    assert after["num_output_tokens"] == before["num_output_tokens"] + 20
    blocks = [after[f"num_{kind}_blocks"] for kind in ("free", "cached", "held")]
    assert sum(blocks) == after["num_kv_blocks"]
    last = after["recent_steps"][-1]
    assert last["step"] == after["num_steps"] and last["num_tokens"] >= last["num_requests"] == 1
    assert 0 < last["forward_seconds"] < last["seconds"]
    url = f"{locked.url}/debug/stats?after={last['step'] - 2}"
    steps = fetch(url, headers).json()["recent_steps"]
    assert [step["step"] for step in steps] == [last["step"] - 1, last["step"]]
    assert "/debug/stats" not in re.sub(r'.*"status": 401.*', "", locked.log.read_text())


@pytest.mark.parametrize("path", ["chat", "text"])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_ends_with_its_timings(server: Server, path: str, n: int) -> None:
    """Without usage they come with the last chunk of the last answer."""
    client = server.client()
    asked: Any = {"model": "tiny", "max_tokens": 5, "n": n, "stream": True}
    if path == "chat":
        chunks = list(client.chat.completions.create(messages=HELLO, **asked))
    else:
        chunks = list(client.completions.create(prompt="Hi", **asked))
    *others, last = chunks
    assert last.choices[0].finish_reason and last.model_extra["timings"]["predicted_n"] > 0
    assert not any("timings" in chunk.model_extra for chunk in others)


@pytest.mark.parametrize("path", ["chat", "text"])
def test_each_chunk_tells_usage_if_asked(server: Server, path: str) -> None:
    client = server.client()
    options = {"include_usage": True, "continuous_usage_stats": True}
    extra = {"ignore_eos": True, "return_token_ids": True}
    asked: Any = {"model": "tiny", "max_tokens": 5, "stream": True, "temperature": 0}
    asked |= {"stream_options": options, "extra_body": extra}
    if path == "chat":
        _, *chunks = client.chat.completions.create(messages=HELLO, **asked)
    else:
        chunks = list(client.completions.create(prompt="Hi", **asked))
    made = [chunk.usage.completion_tokens for chunk in chunks]
    assert made == sorted(made) and made[0] >= 1 and made[-1] == 5
    for chunk in chunks:
        assert chunk.usage.total_tokens == chunk.usage.prompt_tokens + chunk.usage.completion_tokens


def test_a_stream_explains_its_answer_if_asked(server: Server) -> None:
    client = server.client()
    for wanted in (False, True):
        options = {"include_usage": True, "include_explanation": wanted}
        *_, last = client.chat.completions.create(  # type: ignore[call-overload]
            model="tiny",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=5,
            stream=True,
            stream_options=options,
        )
        timings = last.model_extra["timings"] if last.model_extra else {}
        assert ("explanation" in timings) == ("bound" in timings) == wanted
