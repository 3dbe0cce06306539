"""From names to paths: the catalogue's data, and what a name means."""

import hashlib
import os
import re
from pathlib import Path

import pytest

from pellucid.errors import ConfigError, DownloadError, FormatError, UnsupportedError
from pellucid.weights.catalogue import CATALOGUE, DEFAULT_MODEL, default_cache_dir
from pellucid.weights.hub import choose_files, pull, resolve_model

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
FOLDER = ["config.json", "tokenizer.json", "model.safetensors"]


def test_the_catalogue_is_whole() -> None:
    assert DEFAULT_MODEL in CATALOGUE
    assert all(name == model.name == name.lower() for name, model in CATALOGUE.items())
    for model in CATALOGUE.values():
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256) and model.num_bytes > 1_000_000
        assert re.fullmatch(r"[a-z0-9._-]+\.gguf", model.file) and model.licence and model.note
        assert all(
            re.fullmatch(r"[a-z0-9-]+==[0-9.]+", part.wheel) and part.member for part in model.parts
        )
        assert len(set(model.parts)) == len(model.parts)
    for field in ("file", "sha256"):
        assert len({getattr(model, field) for model in CATALOGUE.values()}) == len(CATALOGUE)


@pytest.mark.slow
def test_real_files_match_the_catalogue(models_dir: Path) -> None:
    found = [model for model in CATALOGUE.values() if (models_dir / model.file).is_file()]
    assert found
    for model in found:
        path = models_dir / model.file
        assert path.stat().st_size == model.num_bytes
        with path.open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == model.sha256


@pytest.mark.parametrize("value", ["", "relative/cache"])
def test_the_cache_is_in_the_home_folder_unless_xdg_names_another(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert default_cache_dir() == tmp_path / ".cache" / "pellucid" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "pellucid" / "models"


def test_a_path_that_exists_wins_over_every_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / DEFAULT_MODEL).mkdir()
    (tmp_path / "model.gguf").touch()
    assert resolve_model(DEFAULT_MODEL, cache_dir=tmp_path / "cache") == Path(DEFAULT_MODEL)
    assert resolve_model("~/model.gguf", cache_dir=tmp_path / "cache") == tmp_path / "model.gguf"
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(tmp_path, cache_dir=tmp_path / "cache") == tmp_path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2", "did you mean 'smollm2-135m-instruct'"),
        ("SmolLM2-135M-instrct", "did you mean 'smollm2-135m-instruct'"),
        (
            "nothing-like-it",
            "known are smollm2-135m-instruct, gemma-3-270m, .* and ORG/NAME of the Hugging Face "
            "hub$",
        ),
        ("missing.gguf", "there is no file or folder 'missing.gguf'"),
        ("models/missing.gguf", "there is no file or folder 'models/missing.gguf'"),
        ("./org/name", "there is no file or folder './org/name'"),
        ("/no/such/folder", "there is no file or folder '/no/such/folder'"),
        ("org/name/", "there is no file or folder 'org/name/'"),
        ("a/b/c", "'a/b/c' is no file or folder here"),
        ("org/name:", "'org/name:' is no file or folder here"),
        ("org/na me", "'org/na me' is no file or folder here"),
        ("", "'' is no file or folder here"),
        ("x" * 5000, "is no file or folder here"),
        ("a\0b", "is no file or folder here"),
        ("~nobody-has-this-name/x", "there is no file or folder '~nobody"),
    ],
)
def test_a_name_that_means_nothing_is_refused_with_what_is_known(
    name: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(name, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (
            [*FOLDER, "README.md", "pytorch_model.bin", "onnx/model.onnx"],
            ["config.json", "model.safetensors", "tokenizer.json"],
        ),
        (
            ["config.json", *SHARDS, "model.safetensors.index.json"],
            ["config.json", "model.safetensors.index.json", *SHARDS],
        ),
        (
            [*FOLDER, "consolidated.safetensors", "original/model.safetensors"],
            ["config.json", "model.safetensors", "tokenizer.json"],
        ),
        (
            ["config.json", "weights.safetensors", "x.Q4_K_M.gguf"],
            ["config.json", "weights.safetensors"],
        ),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_XS.gguf"], ["m-Q4_K_M.gguf"]),
        (["m-f16.gguf", "m-q8_0.gguf"], ["m-q8_0.gguf"]),
        (["mmproj-f16.gguf", "z.gguf", "a.imatrix.gguf", "y.gguf"], ["y.gguf"]),
        (["config.json", "m.Q2_K.gguf"], ["m.Q2_K.gguf"]),
    ],
)
def test_a_repository_gives_its_safetensors_or_else_its_most_usual_gguf_file(
    files: list[str], chosen: list[str]
) -> None:
    assert choose_files("org/name", files) == chosen


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        ("Q4_K_M", "m-Q4_K_M.gguf"),
        ("q8_0", "m-Q8_0.gguf"),
        ("Q4_K_S", "sub/m.q4_k_s.gguf"),
        ("UD-Q4_K_XL", "m-UD-Q4_K_XL.gguf"),
    ],
)
def test_a_quantization_is_found_by_its_name_in_either_case(quant: str, chosen: str) -> None:
    files = [
        "config.json",
        "model.safetensors",
        "m-Q4_K_M.gguf",
        "m-Q8_0.gguf",
        "sub/m.q4_k_s.gguf",
        "m-UD-Q4_K_XL.gguf",
        "mmproj-Q8_0.gguf",
    ]
    assert choose_files("org/name", files, quant=quant) == [chosen]


@pytest.mark.parametrize(
    ("files", "quant", "file", "error", "message"),
    [
        (
            ["m-Q4_K_M.gguf"],
            "Q4_K",
            None,
            DownloadError,
            "org/name has no GGUF file of Q4_K; its GGUF files are m-Q4_K_M.gguf",
        ),
        (["m-IQ4_XS.gguf"], "Q4_XS", None, DownloadError, "no GGUF file of Q4_XS"),
        (["a.gguf"], None, "b.gguf", DownloadError, "no file 'b.gguf'; its GGUF files are a.gguf"),
        (
            ["config.json", "pytorch_model.bin"],
            None,
            None,
            DownloadError,
            r"neither config.json with .*; pickled weights \(\*.bin\) are not read",
        ),
        (
            [],
            None,
            None,
            DownloadError,
            r"neither config.json with \*.safetensors nor a \*.gguf file$",
        ),
        (
            ["m-Q8_0-00001-of-00002.gguf", "m-Q8_0-00002-of-00002.gguf"],
            "Q8_0",
            None,
            UnsupportedError,
            "one of several files",
        ),
    ],
)
def test_a_repository_without_the_model_is_refused(
    files: list[str], quant: str | None, file: str | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        choose_files("org/name", files, quant=quant, file=file)


def test_an_existing_path_is_there_to_pull(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    for path in (tmp_path / "model.gguf", tmp_path):
        assert pull(str(path)) == path
    with pytest.raises(ConfigError, match="there is no file or folder"):
        pull(str(tmp_path / "absent.gguf"))


def test_a_path_that_is_neither_a_file_nor_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", Path("/dev/null")):
        for find in (pull, resolve_model):
            with pytest.raises(ConfigError, match=f"^{path} is neither a file nor a folder, so no"):
                find(str(path))


def test_a_folder_with_one_gguf_file_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    assert resolve_model(tmp_path) == tmp_path
    for name in ("m-Q4_0.gguf", "mmproj-f16.gguf"):
        (tmp_path / name).touch()
    assert resolve_model(tmp_path) == tmp_path / "m-Q4_0.gguf"
    (tmp_path / "m-Q8_0.gguf").touch()
    with pytest.raises(ConfigError, match=r"holds 2 GGUF files; .*: m-Q4_0.gguf, m-Q8_0.gguf$"):
        resolve_model(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert resolve_model(tmp_path) == tmp_path


def test_a_folder_with_a_model_in_parts_says_so(tmp_path: Path) -> None:
    for i in (1, 2, 3):
        (tmp_path / f"m-0000{i}-of-00003.gguf").touch()
    with pytest.raises(
        UnsupportedError, match=r"m-00001-of-00003.gguf is one of several files that"
    ):
        resolve_model(tmp_path)


def test_a_gguf_file_of_a_folder_may_not_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "m.gguf").symlink_to("../secret")
    with pytest.raises(FormatError, match=r"m.gguf leads to .*outside the model's folder"):
        resolve_model(tmp_path / "model")
