"""Constrained output: JSON, a JSON Schema, a regex, a choice or a grammar that an answer obeys."""

from .compiler import GrammarCompiler

__all__ = ["GrammarCompiler"]
