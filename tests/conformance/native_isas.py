"""The sets of kernels that this build has and this machine can run, the best first."""

from pellucid.backends.native.backend import ISAS
from pellucid.cpu import detect_cpu

__all__ = ["USABLE"]

USABLE = [isa for isa, needs in ISAS.items() if needs <= set(detect_cpu().features)]
