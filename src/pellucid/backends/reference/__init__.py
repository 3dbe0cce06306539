"""The NumPy backend: the definition of every op, in formulas like those of the papers."""

__all__: list[str] = []
