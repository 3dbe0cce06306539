"""The `config.json` of a hub model without its weights, and the hub's errors in one sentence."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import DownloadError, PellucidError

__all__ = ["fetch_config", "hub_errors"]


def fetch_config(name: str) -> Path | None:
    """The config.json of the hub model ORG/NAME, in Hugging Face's cache; None where it has none.
    Raises DownloadError.
    """
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    here = try_to_load_from_cache(name, "config.json")
    if isinstance(here, str):
        return Path(here)
    with hub_errors(f"config.json of {name}", name):
        # Without a network the list of files fails at once; a download would try for 24 seconds.
        files = [entry.rfilename for entry in HfApi().model_info(name).siblings or ()]
        return Path(hf_hub_download(name, "config.json")) if "config.json" in files else None


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
