"""What becomes of a load when the model's files are not what they should be: cut short while they
are read, links out of the folder, pipes and devices in place of files. Each is one error; nothing
is waited for, and no signal ends the process.

Each case runs in a process of its own, because the faults that it looks for would end or stop it.
"""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import pellucid
from pellucid.errors import FormatError
from pellucid.tokenizer.from_folder import from_folder
from pellucid.weights.checkpoint import open_checkpoint

from .convert import convert
from .harness import GOLDEN

# sys.argv: the path to open, the file to cut
CUT_WHILE_LOADING = """
import os, sys
from pathlib import Path
from pellucid.backends.registry import get_backend
from pellucid.errors import FormatError
from pellucid.weights.checkpoint import open_checkpoint

backend = get_backend("native")
with open_checkpoint(Path(sys.argv[1])) as checkpoint:
    parameters = checkpoint.parameters()
    backend.load_weight(next(parameters)[1])
    os.truncate(sys.argv[2], 20_000)
    try:
        for _, tensor in parameters:
            backend.load_weight(tensor)
    except FormatError as error:
        print(error)
"""
OPEN = """
import sys
from pathlib import Path
from pellucid.errors import PellucidError
from pellucid.weights.checkpoint import open_checkpoint
try:
    open_checkpoint(Path(sys.argv[1]))
except PellucidError as error:
    print(error)
"""


def python(script: str, *arguments: object) -> str:
    """What the script prints. A process that dies or waits fails the test."""
    environment = os.environ | {"PYTHONPATH": str(Path(pellucid.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, (done.returncode, done.stderr)
    return done.stdout


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of a golden model's folder, to be spoilt."""
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "model"))


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "gptq-int4-g32", "compressed-w8a8"])
def test_a_file_that_is_cut_short_while_it_is_loaded_is_an_error(
    kind: str, model: Path, tmp_path: Path
) -> None:
    path, file = model, model / "model.safetensors"
    if "-" in kind:  # a folder whose matrices are packed
        path = Path(shutil.copytree(GOLDEN.parent / "quantized" / kind, tmp_path / "packed"))
        file = path / "model.safetensors"
    elif kind == "gguf":
        path = file = tmp_path / "model.gguf"
        convert(GOLDEN / "llama3", file, "Q8_0")
    assert file.stat().st_size > 30_000
    said = python(CUT_WHILE_LOADING, path, file)
    assert f"{file}: tensor '" in said and "at offset" in said
    assert "the file ends after 20000 bytes; it was cut short" in said


def test_a_disk_that_fails_while_a_file_is_loaded_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_checkpoint(model) as checkpoint:
        parameters = checkpoint.parameters()
        next(parameters)

        def fail(*_: object) -> int:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(FormatError, match=r"tensor .* cannot be read: Input/output error"):
            next(parameters)


@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "a folder"])
@pytest.mark.parametrize(
    "name", ["model.gguf", "config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_what_is_no_regular_file_is_refused_and_not_waited_for(
    name: str, kind: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = model / name
    file.unlink(missing_ok=True)
    if kind == "a pipe":
        os.mkfifo(file)
    elif kind == "a socket":
        monkeypatch.chdir(model)  # a socket's path has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "a device":
        file.symlink_to("/dev/zero")
    else:
        file.mkdir()
    if name == "model.gguf" and kind == "a folder":
        assert "has no config.json" in python(OPEN, file)
        return
    path = file if name == "model.gguf" else model
    assert f"{file} is {kind}; it must be a regular file" in python(OPEN, path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json"]
)
def test_a_link_out_of_the_folder_is_not_followed(name: str, model: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    if (model / name).exists():
        (model / name).rename(outside)
    else:
        outside.write_text("{}")
    (model / name).symlink_to(outside)
    with pytest.raises(FormatError, match=f"{name} leads to .*outside the model's folder"):
        open_checkpoint(model)


def test_shards_that_are_links_are_held_to_the_folder_too(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").rename(tmp_path / "shard")
    (model / "model-00001-of-00001.safetensors").symlink_to(tmp_path / "shard")
    (model / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "model-00001-of-00001.safetensors"}}'
    )
    with pytest.raises(FormatError, match=r"00001.safetensors leads to .*outside the model's"):
        open_checkpoint(model)


def test_a_hub_cache_is_read_through_its_links(model: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    for file in model.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with open_checkpoint(snapshot) as checkpoint:
        assert dict(checkpoint.parameters())


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "chat_template.jinja",
    ],
)
def test_the_tokenizers_files_are_held_to_the_folder_too(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(TINY)
    from_folder(folder)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/passwd")
    with pytest.raises(FormatError, match=f"{name} leads to /etc/passwd, outside the model's"):
        from_folder(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(FormatError, match=f"{name} is a pipe; it must be a regular file"):
        from_folder(folder)


TINY = """{
  "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
  "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                    "use_regex": true},
  "post_processor": null,
  "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
              "use_regex": true},
  "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": false, "vocab": {"a": 0, "b": 1}, "merges": []}
}"""
