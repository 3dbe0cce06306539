"""The key/value cache: what it costs (`layout`), which requests hold which blocks (`block_pool`,
`radix_tree`, `manager`), and where the bytes lie (`storage`).
"""

__all__: list[str] = []
