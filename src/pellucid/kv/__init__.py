"""The key/value cache: what it costs (`layout`), who holds which block (`block_pool`, `manager`),
and where the bytes lie (`storage`).
"""

__all__: list[str] = []
