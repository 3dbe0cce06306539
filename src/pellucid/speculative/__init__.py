"""Speculative decoding: proposers draft tokens, and a governor says how many to verify."""

from .methods import build_proposers
from .speculation import Speculation

__all__ = ["Speculation", "build_proposers"]
