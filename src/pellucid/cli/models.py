"""`pellucid models`: what is known by name, and what of it is here. `pellucid pull`: bring a model
here and check it.
"""

import json

import click

from ..units import format_bytes
from ..weights import hub
from ..weights.catalogue import CATALOGUE, DEFAULT_MODEL
from ..weights.wheels import is_here
from .options import debug_option, json_option
from .terminal import print_table

__all__ = ["models", "pull"]


@click.command()
@json_option
@debug_option
def models(as_json: bool) -> None:
    """List the models known by name, and which of them are here."""
    folder = hub.default_cache_dir()
    here = {model.name: is_here(model, folder) for model in CATALOGUE.values()}
    if as_json:
        listed = [
            {
                "name": m.name,
                "default": m.name == DEFAULT_MODEL,
                "here": here[m.name],
                "path": str(folder / m.file) if here[m.name] else None,
                "bytes": m.num_bytes,
                "sha256": m.sha256,
                "licence": m.licence,
                "note": m.note,
                "wheels": [part.wheel for part in m.parts],
            }
            for m in CATALOGUE.values()
        ]
        click.echo(json.dumps({"folder": str(folder), "models": listed}, indent=2))
        return
    rows = [
        [m.name, "yes" if here[m.name] else "no", format_bytes(m.num_bytes), m.licence, m.note]
        for m in CATALOGUE.values()
    ]
    print_table(["name", "here", "size", "licence", "what it is"], rows)
    click.echo(
        f"\nThey are kept in {folder}. Besides these, MODEL may be a .gguf file, a folder, or "
        "ORG/NAME[:QUANT] of the Hugging Face hub."
    )


@click.command()
@click.argument("name")
@debug_option
def pull(name: str) -> None:
    """Bring the model NAME here, checked, and print its path.

    NAME is one that `pellucid models` lists, or ORG/NAME[:QUANT] of the Hugging Face hub. A file
    that is here and right is left alone.
    """
    click.echo(hub.pull(name, progress=True))
