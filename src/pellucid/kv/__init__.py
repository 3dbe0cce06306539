"""The key/value cache: what it costs (`layout`), which block is held by whom (`block_pool`,
`radix_tree`, `manager`), and where the bytes lie (`storage`).
"""

__all__: list[str] = []
