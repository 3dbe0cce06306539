"""The `config.json` of a hub model, without its weights: all that a plan of its memory needs."""

from pathlib import Path

from ..errors import DownloadError

__all__ = ["fetch_config"]


def fetch_config(name: str) -> Path:
    """The config.json of the hub model ORG/NAME, in Hugging Face's cache. Raises DownloadError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, "config.json"))
    # the hub's client raises what its HTTP library raises; all of it means: it did not come
    except Exception as error:
        # "local": it is not in the cache, and the hub could not be asked
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise DownloadError(
                f"{name} has no config.json on the hub; `pellucid pull {name}` brings its GGUF "
                "file, whose header can be read"
            ) from error
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"config.json of {name} could not be fetched: {reason}") from error
