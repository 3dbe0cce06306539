"""The interface between models and backends: the ops (`protocol`), what a backend must offer
(`backend`), costs (`cost`) and conformance cases (`cases`, `budget`).
"""

__all__: list[str] = []
