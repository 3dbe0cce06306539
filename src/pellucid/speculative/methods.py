"""The methods of speculation by their names."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..checks import unknown_name
from ..errors import ConfigError
from .lookup import Histories, NgramProposer, SuffixProposer
from .proposer import Proposer

__all__ = ["DRAFT", "METHODS", "build_proposers", "check_method"]

DRAFT = "draft:"  # the method of a draft model, before the name of the model

METHODS: Mapping[str, tuple[Callable[[Histories], Proposer], ...]] = MappingProxyType(
    {
        # What costs next to nothing. The matches that ngram copies vote in suffix too.
        "auto": (SuffixProposer,),
        "ngram": (NgramProposer,),
        "suffix": (SuffixProposer,),
        "none": (),
    }
)


_HEADS = "it needs weights that were trained to draft for the model, and those are not read"
_LOOKUP = "its name here is ngram"
# Methods of vLLM and llama.cpp that have another name here, or none.
_ELSEWHERE: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("eagle", "eagle3", "medusa", "mlp_speculator", "mtp"), _HEADS),
        **dict.fromkeys(("ngram_gpu", "prompt_lookup", "[ngram]", "lookup"), _LOOKUP),
        **dict.fromkeys(("draft", "draft_model"), f"name the model too, as {DRAFT}MODEL"),
    }
)


def check_method(method: str | None) -> None:
    """Raise ConfigError unless `method` names a method, or a draft model, or is None."""
    if method is None or method in METHODS:
        return
    if method.startswith(DRAFT):
        if not method.removeprefix(DRAFT).strip():
            raise ConfigError(f"speculative is {method!r}; {DRAFT} is followed by a model")
        return
    raise ConfigError(
        unknown_name("method of speculation", method, [*METHODS, f"{DRAFT}MODEL"], _ELSEWHERE)
    )


def build_proposers(method: str) -> list[Proposer]:
    """New proposers of a method without a model; `none` has none. Raises ConfigError for a name
    that is none.
    """
    check_method(method)
    histories = Histories()
    return [build(histories) for build in METHODS[method]]
