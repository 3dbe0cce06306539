"""Small files of a hub model without its weights, and the hub's errors in one sentence."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DownloadError, PellucidError

__all__ = ["fetch_file", "hub_errors", "list_files"]


def list_files(repo: str) -> list[str]:
    """The names of a repository's files. Raises DownloadError."""
    from huggingface_hub import HfApi

    # Without a network this fails at once; a download would try for 24 seconds.
    with hub_errors(f"the list of files of {repo}", repo):
        return [entry.rfilename for entry in HfApi().model_info(repo).siblings or ()]


def fetch_file(repo: str, file: str) -> Path:
    """A small file of the repository, in Hugging Face's cache. Raises DownloadError."""
    from huggingface_hub import hf_hub_download

    with hub_errors(f"{file} of {repo}", repo):
        return Path(hf_hub_download(repo, file))


@contextmanager
def hub_errors(what: str, repo: str, hint: str = "") -> Iterator[None]:
    """Turn what the hub's client and its HTTP library raise into a DownloadError of one sentence.
    `what` did not come, `repo` is ORG/NAME, `hint` ends the sentence.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except PellucidError:
        raise
    except GatedRepoError as error:
        raise DownloadError(
            f"{repo} is gated: accept its terms on its page on the hub and log in with `hf "
            "auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"the Hugging Face hub has no model {repo!r}, or it is private and needs `hf "
            f"auth login`{hint}"
        ) from error
    # the hub's client lets exceptions of its HTTP library through; each means that the fetch failed
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = error.filename or "the Hugging Face cache"
            raise DownloadError(f"the disk is full: {where} has no room for {what}") from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(
            f"{what} is not in the Hugging Face cache and could not be fetched: {reason}{hint}"
        ) from error
