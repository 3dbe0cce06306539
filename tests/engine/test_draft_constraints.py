"""Drafts and constrained output: a draft can neither break a constraint nor fail its request."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="constrained output needs the extra 'structured'")

from pellucid import EngineConfig, SamplingParams, StructuredOutputsParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.errors import RequestError
from pellucid.structured import GrammarCompiler
from pellucid.structured.grammar_constraint import GrammarConstraint

from .drafting import drafting_core

A, B, EOS = 97, 98, 257
CONFIG = EngineConfig(max_model_len=64, speculative=None, backend_options={"threads": 1})
MOST_STEPS = 200


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[OpenModel]:
    with open_model(tiny_path) as opened:
        yield opened


def answer(core: EngineCore, model: OpenModel, regex: str) -> Any:
    """The completion of a request whose output has to match."""
    wanted = StructuredOutputsParams(regex=regex)
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=40, structured_outputs=wanted)
    constraint = GrammarCompiler(model.tokenizer).compile(wanted)
    prompt = TokenizedPrompt([*b"say"], None)
    core.add_requests([Submission("a", prompt, params, constraint=constraint)])
    for _ in range(MOST_STEPS):
        for output in core.step():
            if output.finished:
                return output.outputs
    raise AssertionError("the request does not end")


@pytest.mark.parametrize("draft", [300, 1 << 31, EOS, 65])
def test_a_draft_that_may_not_come_leaves_the_constraint_as_it_was(
    model: OpenModel, draft: int
) -> None:
    """Models have rows of the vocabulary that are no tokens of their tokenizers. A prompt may have
    them, so they may be drafted.
    """
    wanted = StructuredOutputsParams(regex="ab+c")
    constraint = GrammarCompiler(model.tokenizer).compile(wanted)
    [before] = constraint.masks([])
    assert before is not None and before.nonzero()[0].tolist() == [A]
    assert [mask is None for mask in constraint.masks([draft, A])] == [False, True, True]
    assert [mask is None for mask in constraint.masks([A, draft])] == [False, False, True]
    [after] = constraint.masks([])
    assert after is not None and after.tolist() == before.tolist()


def test_a_mask_that_cannot_be_computed_behind_a_draft_fails_no_request(
    model: OpenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft may be wrong. If it is right, the next step computes the same mask."""
    regex, num_failed = "(ab|ba){8,12}", 0
    expected = answer(model.build_engine(CONFIG).core, model, regex)
    exact: Any = GrammarConstraint._mask

    def limited(self: GrammarConstraint, matcher: Any) -> Any:
        nonlocal num_failed
        num_failed += matcher is not self._matcher
        if matcher is not self._matcher and num_failed % 3 == 0:
            raise RequestError("exceeds what a step may compute")
        return exact(self, matcher)

    monkeypatch.setattr(GrammarConstraint, "_mask", limited)
    text = [*expected[0].token_ids]
    core = drafting_core(
        model, CONFIG, lambda rs: {r.request_id: text[len(r.output_token_ids) :][:5] for r in rs}
    )
    assert answer(core, model, regex) == expected
    assert num_failed > 5 and core.stats().num_accepted_tokens > 5
