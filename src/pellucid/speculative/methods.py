"""The methods of speculation by their names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..checks import unknown_name
from ..errors import ConfigError
from .lookup import Histories, NgramProposer, SuffixProposer
from .proposer import Proposer

__all__ = ["DRAFT", "METHODS", "build_proposers"]

DRAFT = "draft:"  # the method of a draft model, before the name of the model

METHODS: Mapping[str, tuple[Callable[[Histories], Proposer], ...]] = MappingProxyType(
    {
        "auto": (NgramProposer, SuffixProposer),  # all that cost next to nothing
        "ngram": (NgramProposer,),
        "suffix": (SuffixProposer,),
    }
)


def build_proposers(method: str) -> list[Proposer]:
    """New proposers of a method. Raises ConfigError for a name that is none."""
    if method not in METHODS:
        raise ConfigError(
            unknown_name("method of speculation", method, [*METHODS, f"{DRAFT}MODEL"])
        )
    histories = Histories()
    return [build(histories) for build in METHODS[method]]
