"""Ways to compute the ops: `reference` (NumPy) defines them. A backend is chosen by name
(`registry`) and imports no other backend.
"""

__all__: list[str] = []
