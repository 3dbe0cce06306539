"""The HTTP server: OpenAI's API over an `AsyncEngine`. `run.run_server` runs it, and
`app.create_app` makes its ASGI app; both need the extra `server`.
"""

__all__: list[str] = []
