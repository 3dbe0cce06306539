"""The vocabulary between models and backends: the ops (`protocol`), their costs (`cost`), their
conformance cases (`cases`, `budget`).
"""

__all__: list[str] = []
