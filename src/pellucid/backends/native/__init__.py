"""The native CPU backend: C++ kernels for quantized weights, run as captured programs (csrc/)."""

__all__: list[str] = []
