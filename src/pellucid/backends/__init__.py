"""Ways to compute the ops: `reference` (NumPy) defines them. A backend is asked for by name
(`registry`) and knows no other backend.
"""

__all__: list[str] = []
