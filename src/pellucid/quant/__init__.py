"""Writing quantized models: which tensor gets which format, and the files."""

__all__: list[str] = []
