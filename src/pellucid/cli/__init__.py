"""The commands of the terminal. Thin: each reads its options, calls the public face of a room, and
prints. Nobody imports this room.
"""

__all__: list[str] = []
