"""The Hugging Face hub through its real client: what it fetches, finds, lists and deletes.

The client reads its environment when it is imported, so each test that needs it runs a small script
in a process of its own: offline, over a cache laid out as the client lays it out; or online,
against a hub on the loopback interface that speaks what the client asks for.
"""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import pellucid
from pellucid.weights.catalogue import CATALOGUE, DEFAULT_MODEL

pytestmark = pytest.mark.slow  # each test starts a server

COMMIT = "0123456789abcdef0123456789abcdef01234567"
INDEX = json.dumps(
    {
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        }
    }
)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FOLDER = ["config.json", "tokenizer.json", "model.safetensors"]
SCRIPT = """
import json, sys
from pathlib import Path
from pellucid.errors import PellucidError
from pellucid.weights import hub
answers = []
verbs = {
    "resolve": hub.resolve_model,
    "pull": hub.pull,
    "remove": hub.remove_cached,
    "list": lambda _: json.dumps([[m.name, str(m.path), m.num_bytes] for m in hub.list_cached()]),
}
for verb, name in json.loads(sys.argv[1]):
    try:
        answers.append(["ok", str(verbs[verb](name))])
    except PellucidError as error:
        answers.append([type(error).__name__, str(error)])
print(json.dumps(answers))
"""


def ask(home: Path, *questions: tuple[str, str], **environment: str) -> list[tuple[str, str]]:
    """(kind of answer, path or message) for each (verb, name), in a process with its own Hugging
    Face cache.
    """
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("HF_", "HUGGING")) and not k.lower().endswith("_proxy")
    }
    own = {
        "HF_HOME": str(home),
        "XDG_CACHE_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    own["PYTHONPATH"] = str(Path(pellucid.__file__).parents[1])
    command = [sys.executable, "-c", SCRIPT, json.dumps(questions)]
    done = subprocess.run(
        command,
        env=kept | own | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(kind, text) for kind, text in json.loads(done.stdout)]


def lay_out(home: Path, repo: str, files: Sequence[str]) -> Path:
    """Put a repository into the cache of the client, as the client does: blobs, and a snapshot of
    links to them.
    """
    folder = home / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for name in files:
        content = INDEX.encode() if name.endswith("index.json") else name.encode()
        blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return snapshot


def test_models_that_others_fetched_are_found_offline(tmp_path: Path) -> None:
    plain = lay_out(tmp_path, "org/plain", FOLDER)
    sharded = lay_out(
        tmp_path,
        "org/sharded",
        ["config.json", "tokenizer.json", "model.safetensors.index.json", *SHARDS],
    )
    gguf = lay_out(tmp_path, "org/some-GGUF", ["some-Q8_0.gguf", "deep/some-Q4_0.gguf"])
    lay_out(
        tmp_path,
        "org/cut-short",
        ["config.json", "tokenizer.json", "model.safetensors.index.json", SHARDS[0]],
    )
    lay_out(tmp_path, "org/tokenizer-only", ["config.json", "tokenizer.json"])
    found = {
        "org/plain": plain,
        "org/sharded": sharded,
        "org/some-GGUF": gguf / "some-Q8_0.gguf",
        "org/some-GGUF:Q4_0": gguf / "deep/some-Q4_0.gguf",
        "org/some-GGUF/deep/some-Q4_0.gguf": gguf / "deep/some-Q4_0.gguf",
    }
    missing = ["org/cut-short", "org/tokenizer-only", "org/some-GGUF:Q2_K", "org/never-heard-of"]
    answers = ask(tmp_path, *(("resolve", name) for name in [*found, *missing]), HF_HUB_OFFLINE="1")
    assert answers[: len(found)] == [("ok", str(path)) for path in found.values()]
    for name, (kind, message) in zip(missing, answers[len(found) :], strict=True):
        assert kind == "DownloadError" and message.startswith(
            f"{name} is not in the Hugging Face cache and could not be fetched: "
        )
        assert "\n" not in message


def test_what_is_in_the_caches_is_listed_and_deleted_by_name(tmp_path: Path) -> None:
    model = next(iter(CATALOGUE.values()))
    file = tmp_path / "pellucid" / "models" / model.file
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(model.num_bytes)
    plain = lay_out(tmp_path, "org/plain", FOLDER)
    gguf = lay_out(tmp_path, "org/some-GGUF", ["some-Q8_0.gguf", "deep/some-Q4_0.gguf"])
    lay_out(tmp_path, "org/tokenizer-only", ["config.json", "tokenizer.json"])
    names = ["org/some-GGUF:Q4_0", "org/some-GGUF:Q4_0", "ORG/plain", "org/plain", "org/never"]
    answers = ask(
        tmp_path,
        ("list", ""),
        *(("remove", name) for name in [*names, model.name.upper(), model.name, "~", ".."]),
        ("list", ""),
    )
    assert answers[0][0] == "ok" and json.loads(answers[0][1]) == [
        [model.name, str(file), model.num_bytes],
        ["org/plain", str(plain), sum(map(len, FOLDER))],
        ["org/some-GGUF/deep/some-Q4_0.gguf", str(gguf / "deep/some-Q4_0.gguf"), 19],
        ["org/some-GGUF/some-Q8_0.gguf", str(gguf / "some-Q8_0.gguf"), 14],
    ]
    freed = [text for kind, text in answers[1:-1] if kind == "ok"]
    whole = sum(map(len, FOLDER)) + len(COMMIT)
    assert freed == ["19", str(whole), str(model.num_bytes)]
    refused = [text for kind, text in answers[1:-1] if kind != "ok"]
    assert refused == [
        "org/some-GGUF:Q4_0 has no GGUF file of Q4_0; its GGUF files are some-Q8_0.gguf",
        "org/plain is not in the Hugging Face cache; nothing was deleted",
        "org/never is not in the Hugging Face cache; nothing was deleted",
        f"{model.name} is not in {file.parent}; there is nothing to delete",
        "'~' is a path; only models of the cache are deleted, by the names that they have there",
        "'..' is a path; only models of the cache are deleted, by the names that they have there",
    ]
    assert json.loads(answers[-1][1]) == [
        ["org/some-GGUF/some-Q8_0.gguf", str(gguf / "some-Q8_0.gguf"), 14]
    ]
    assert not plain.parents[1].exists() and not file.exists()


def test_names_are_taken_in_any_case_and_the_nearest_is_told(tmp_path: Path) -> None:
    model = CATALOGUE[DEFAULT_MODEL]
    file = tmp_path / "pellucid" / "models" / model.file
    file.parent.mkdir(parents=True)
    with file.open("wb") as sparse:
        sparse.truncate(model.num_bytes)
    plain = lay_out(tmp_path, "Org/Plain-7B", FOLDER)
    answers = ask(
        tmp_path,
        ("resolve", DEFAULT_MODEL.upper()),
        ("resolve", "org/plain-7b"),
        ("resolve", "org/plian-7B"),
        HF_HUB_OFFLINE="1",
    )
    assert answers[:2] == [("ok", str(file)), ("ok", str(plain))]
    assert answers[2][0] == "DownloadError"
    assert answers[2][1].endswith("; the cache holds 'Org/Plain-7B'")


class Hub(http.server.ThreadingHTTPServer):
    """A Hugging Face hub of a few small files, as its client sees it."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.repositories = repositories
        self.sent: list[str] = []


class _HubHandler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        api = re.fullmatch(r"api/models/(\w+/[\w-]+)(?:/(revision|tree)/(\w+))?", path)
        resolve = re.fullmatch(r"(\w+/[\w-]+)/resolve/(\w+)/(.+)", path)
        match = api or resolve
        files = self.server.repositories.get(match[1]) if match else None
        if match is None or files is None:
            self._send(
                404,
                b"{}",
                {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"},
            )
        elif match[1] == "org/gated":
            self._send(
                403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}
            )
        elif resolve:
            content = files[resolve[3]]
            if self.command == "GET":
                self.server.sent.append(resolve[3])
            etag = hashlib.sha1(content).hexdigest()
            self._send(
                200,
                content,
                {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"},
            )
        elif match[2] == "tree":
            tree = [
                {"type": "file", "path": f, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for f, c in files.items()
            ]
            self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        else:
            info = {
                "id": match[1],
                "modelId": match[1],
                "sha": COMMIT,
                "siblings": [{"rfilename": f} for f in files],
            }
            self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    do_HEAD = do_GET

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def test_the_hub_gives_the_files_of_a_model_and_no_others(tmp_path: Path) -> None:
    plain = {
        name: name.encode() for name in [*FOLDER, "pytorch_model.bin", "README.md", "tf_model.h5"]
    }
    gguf = {
        name: name.encode() for name in ["some-Q8_0.gguf", "some-Q4_K_M.gguf", "some-Q2_K.gguf"]
    }
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"cos\nsystem"}
    with serve(
        {"org/plain": plain, "org/some-GGUF": gguf, "org/pickled": pickled, "org/gated": {}}
    ) as hub:
        endpoint = f"http://127.0.0.1:{hub.server_port}"
        names = [
            "org/plain",
            "org/some-GGUF",
            "org/some-GGUF:q8_0",
            "org/pickled",
            "org/missing",
            "org/gated",
        ]
        answers = ask(tmp_path, *(("resolve", name) for name in names), HF_ENDPOINT=endpoint)
        sent, hub.sent = hub.sent, []
        again = ask(tmp_path, ("resolve", "org/plain"), ("pull", "org/plain"), HF_ENDPOINT=endpoint)
        assert hub.sent == []  # here already: asked about when pulled, and not sent again
    assert [kind for kind, _ in answers] == [
        "ok",
        "ok",
        "ok",
        "DownloadError",
        "DownloadError",
        "DownloadError",
    ]
    snapshot = Path(answers[0][1])
    assert sorted(p.name for p in snapshot.iterdir()) == sorted(FOLDER)
    assert [Path(path).read_bytes() for _, path in answers[1:3]] == [
        b"some-Q4_K_M.gguf",
        b"some-Q8_0.gguf",
    ]
    assert sorted(sent) == sorted([*FOLDER, "some-Q4_K_M.gguf", "some-Q8_0.gguf"])
    assert "pickled weights" in answers[3][1]
    assert "has no model 'org/missing', or it is private" in answers[4][1]
    assert "org/gated is gated: accept its terms" in answers[5][1]
    assert again == [answers[0], answers[0]]
