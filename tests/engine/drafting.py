"""Speculation for tests: all drafts are verified, whatever they cost."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pellucid.engine.core import EngineCore
from pellucid.engine.loader import OpenModel
from pellucid.engine_config import EngineConfig
from pellucid.request import Request
from pellucid.speculative import Speculation
from pellucid.speculative.governor import VerifyAll
from pellucid.speculative.proposer import Draft

__all__ = ["ListProposer", "drafting_core"]


class ListProposer:
    """A proposer made of a function: requests -> request_id -> token ids."""

    name = "guesses"
    priors = (0.5,)
    is_free = True

    def __init__(self, guess: Callable[[Sequence[Request]], Any]) -> None:
        self._guess = guess

    def propose(self, requests: Sequence[Request], limit: int) -> Any:
        """Drafts of the function's lists; what is no list stays as it is."""
        guessed = self._guess(requests)
        if not isinstance(guessed, Mapping):
            return guessed
        return {
            name: Draft(ids, [0] * len(ids)) if isinstance(ids, list) else ids
            for name, ids in guessed.items()
        }

    def finish(self, request: Request) -> None:
        """Nothing is kept."""


def drafting_core(
    model: OpenModel, config: EngineConfig, guess: Callable[[Sequence[Request]], Any]
) -> EngineCore:
    """An engine that verifies all that `guess` drafts."""
    built = model.build_engine(config).core
    speculation = Speculation(
        [ListProposer(guess)], model.model_config.vocab_size, governor=VerifyAll()
    )
    return EngineCore(
        model.model_config,
        model.tokenizer,
        built.scheduler,
        built.runner,
        seed=0,
        speculation=speculation,
    )
