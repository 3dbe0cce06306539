"""The HTTP server: OpenAI's API over an `AsyncEngine`."""

__all__: list[str] = []
