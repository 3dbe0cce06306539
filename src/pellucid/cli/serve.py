"""`pellucid serve`: a server with OpenAI's API.

It prints in one screen what it serves, where, what fits, and a line to try it with; then a line of
JSON for each request. The first Ctrl-C or SIGTERM lets requests end, the second does not.
"""

import logging
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from ..engine_config import EngineConfig
from ..errors import ConfigError
from ..server.settings import ServerSettings
from ..weights.catalogue import DEFAULT_MODEL
from .options import EngineOptions, debug_option, engine_options, loading_options, options_of
from .terminal import say

if TYPE_CHECKING:
    from ..engine.async_engine import AsyncEngine

__all__ = ["serve"]


@click.command()
@click.argument("model", default=DEFAULT_MODEL)
@loading_options
@engine_options
@options_of(ServerSettings, "server")
@debug_option
def serve(
    model: str, loading: dict[str, Any], engine: EngineOptions, server: dict[str, Any]
) -> None:
    """Serve MODEL with OpenAI's API: chat, completions, tools, structured outputs.

    MODEL is a .gguf file, a folder of safetensors, a name (see `pellucid list`), or
    ORG/NAME[:QUANT] of the Hugging Face hub.
    """
    start = time.monotonic()
    settings = ServerSettings(**server)
    try:
        from ..server.run import check_settings, run_server
    except ImportError as error:
        raise ConfigError(
            f"pellucid serve needs {error.name}: pip install 'pellucid[server]'"
        ) from None
    check_settings(settings)
    from ..engine.async_engine import AsyncEngine
    from ..engine.options import build_engine_config

    config = build_engine_config(loading | engine.fields())
    loaded = AsyncEngine.load(model, config, progress=True)
    name = settings.served_model_name or model
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("pellucid.access").setLevel(logging.INFO)

    def on_ready(port: int) -> None:
        screen = _screen(loaded, name, settings.host, port, bool(settings.ssl_certfile), config)
        for line in screen:
            say(line)
        say(f"ready in {time.monotonic() - start:.2f} s; Ctrl-C ends")

    run_server(loaded, name, settings, on_ready)


def _screen(
    engine: "AsyncEngine", name: str, host: str, port: int, is_https: bool, config: EngineConfig
) -> list[str]:
    """What is served, where, what fits, and a line to try it with."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"{'https' if is_https else 'http'}://{f'[{shown}]' if ':' in shown else shown}:{port}"
    stats = engine.stats()
    num_tokens = stats.num_kv_blocks * config.block_size
    fits = ", ".join(
        f"{num_tokens // length} of {length:,} tokens"
        for length in (1024, 8192)
        if length <= engine.max_model_len
    )
    return [
        f"{name}  ({engine.path})",
        f"  API       {url}/v1   documentation {url}/docs",
        f"  context   {engine.max_model_len:,} tokens; the KV cache holds {num_tokens:,}"
        + (f": sequences at a time: {fits}" if fits else ""),
        f"  try       curl {url}/v1/chat/completions -H 'content-type: application/json' -d "
        f'\'{{"model": "{name}", "messages": [{{"role": "user", "content": '
        '"What is a GPU?"}]}\'',
    ]
