"""`ServerSettings`: where the server listens, and every limit that it sets to requests.

Each field is also an option of `pellucid serve`. 0 means no limit where the help says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import urlsplit

from ..checks import Bounds, check_fields, option, show
from ..errors import ConfigError
from ..structured_params import MAX_GRAMMAR, MAX_SCHEMA_DEPTH

__all__ = ["ServerSettings"]

MIB = 1 << 20
MetricsAliases = Literal["none", "vllm"]
Key = Annotated[str, Bounds(low=1, high=512)]


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Checked when it is built; raises ConfigError."""

    host: str = option("127.0.0.1", help="Address to listen on; 0.0.0.0 for all", high=255)
    port: int = option(8000, low=0, high=65535, help="Port to listen on; 0: any that is free")
    served_model_name: str | None = option(
        None, low=1, high=256, help="Name of the model in the API; None: the one it was loaded by"
    )
    api_key: Sequence[Key] = option(
        default_factory=list, high=1024, help="Keys that clients must send; none: open to all"
    )
    root_path: str = option("", high=256, help="Prefix of all paths behind a proxy")
    allowed_origins: Sequence[Key] = option(
        default_factory=list, high=64, help="Web origins that may call the API; none by default"
    )
    ssl_certfile: str | None = option(None, help="Certificate for HTTPS")
    ssl_keyfile: str | None = option(None, help="Key of the certificate")
    metrics_aliases: MetricsAliases = option(
        "none",
        help='"vllm" tells each metric under the prefix vllm: too, for dashboards made for it',
    )
    otlp_traces_endpoint: str | None = option(
        None,
        low=1,
        high=1024,
        help="URL of an OpenTelemetry collector that gets a trace of each request, by OTLP over "
        "HTTP; without a path, /v1/traces is meant",
    )
    access_log: bool = option(True, help="Log a line of JSON for each request")
    # times
    request_timeout: float = option(
        600.0, low=0, high=1e6, unit="seconds", help="Longest time of a request; 0: no limit"
    )
    read_timeout: float = option(
        20.0, above=0, high=1e6, unit="seconds", help="Longest time to send headers, or a body"
    )
    write_timeout: float = option(
        60.0, above=0, high=1e6, unit="seconds", help="Longest wait for a client that reads slowly"
    )
    drain_timeout: float = option(
        30.0, low=0, high=1e6, unit="seconds", help="After SIGTERM: time for requests to end"
    )
    # load
    max_connections: int = option(4096, low=1, high=1 << 20, help="Open connections")
    max_requests: int = option(
        512, low=1, high=1 << 20, help="Requests that are served or wait; more get 503"
    )
    max_requests_per_key: int = option(
        0, low=0, high=1 << 20, help="The same for one API key; more get 429; 0: no limit"
    )
    # sizes
    max_body_bytes: int = option(4 * MIB, low=1024, high=1 << 30, unit="bytes", help="Of a request")
    max_header_bytes: int = option(64 << 10, low=1024, high=MIB, unit="bytes", help="Of a request")
    max_messages: int = option(2048, low=1, high=1 << 20, help="Messages of a chat")
    max_prompts: int = option(128, low=1, high=1 << 16, help="Prompts of one completion request")
    max_embedding_inputs: int = option(
        2048, low=1, high=1 << 16, help="Inputs of one request for embeddings"
    )
    max_completions: int = option(
        128, low=1, high=1 << 16, help="Prompts of a request times n: answers of one request"
    )
    max_tokenized: int = option(
        1 << 19, low=1, high=1 << 24, help="Characters for /tokenize, tokens for /detokenize"
    )
    max_tools: int = option(128, low=1, high=1 << 12, help="Tools of a chat")
    max_logprobs: int = option(20, low=0, high=1024, help="Likeliest tokens per position")
    max_logit_bias: int = option(1024, low=0, high=4096, help="Entries of logit_bias")
    max_stop: int = option(16, low=0, high=64, help="Stop strings")
    max_schema: int = option(
        MAX_GRAMMAR,
        low=1,
        high=MAX_GRAMMAR,
        unit="characters",
        help="Of a schema, a regex, choices, a grammar, or the tools of which one must be called",
    )
    max_schema_depth: int = option(
        MAX_SCHEMA_DEPTH, low=1, high=MAX_SCHEMA_DEPTH, help="Levels of a schema, also a tool's"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.otlp_traces_endpoint is not None:
            endpoint = _checked_endpoint(self.otlp_traces_endpoint)
            object.__setattr__(self, "otlp_traces_endpoint", endpoint)


def _checked_endpoint(endpoint: str) -> str:
    """The URL of a collector with its path. Raises ConfigError for what is none."""
    try:
        url = urlsplit(endpoint)
        is_known = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:  # a port that is no number
        is_known = False
    if not is_known:
        raise ConfigError(
            f"otlp_traces_endpoint is {show(endpoint)}; it must be a URL such as "
            "http://localhost:4318/v1/traces (OTLP over HTTP, not gRPC)"
        )
    return url._replace(path="/v1/traces").geturl() if url.path in ("", "/") else endpoint
