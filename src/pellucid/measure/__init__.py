"""What the machine can do and what the engine makes of it: measured, never assumed. Nobody below
imports this room.
"""

__all__: list[str] = []
