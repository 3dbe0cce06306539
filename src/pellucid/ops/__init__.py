"""The vocabulary between models and backends: the ops (`protocol`), their costs (`cost`), their
tests (`cases`, `budget`).
"""

__all__: list[str] = []
