"""The commands of the command line. They are thin: each reads its options, calls public functions
of other rooms, and prints. No other room imports this one.
"""

__all__: list[str] = []
