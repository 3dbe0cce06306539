"""The NumPy backend: the definition of every op, written to be read beside the papers."""

__all__: list[str] = []
