"""Measurements of the machine and of the engine. No room below imports this one."""

__all__: list[str] = []
