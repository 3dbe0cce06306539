"""Every set of kernels that this machine can run, and not the best alone, on every case: within the
budget.

test_conformance.py runs the best; here are the others. Forcing a set that the CPU lacks is an error
that lists those it has.
"""

import functools

import pytest

from pellucid import _native
from pellucid.backends.native.backend import ISAS, NativeBackend, choose_isa
from pellucid.errors import ConfigError
from pellucid.ops.case_lists import CASES
from pellucid.ops.cases import AttentionCase, Case

from .harness import check_case
from .native_isas import USABLE

OTHERS = USABLE[1:]


@functools.cache
def backend(isa: str) -> NativeBackend:
    return NativeBackend(isa, threads=2)


@pytest.mark.parametrize("isa", OTHERS)
@pytest.mark.parametrize(
    "case",
    [c for c in CASES if not (isinstance(c, AttentionCase) and c.block_size % 16)],
    ids=lambda case: case.name,
)
def test_every_set_of_kernels_computes_the_formula_within_the_budget(isa: str, case: Case) -> None:
    check_case(backend(isa), case, float32_activations=False)


def test_the_best_set_is_taken_unless_another_is_asked_for() -> None:
    assert choose_isa(None) == USABLE[0]
    assert [choose_isa(isa) for isa in USABLE] == USABLE
    assert USABLE[-1] == "portable"


def test_a_set_that_cannot_be_had_is_refused_with_those_that_can() -> None:
    for isa in ["sse9", "", *sorted(set(ISAS) - set(USABLE))]:
        with pytest.raises(
            ConfigError, match=f"isa is {isa!r}.*must be one of: {', '.join(USABLE)}"
        ):
            NativeBackend(isa)


def test_every_table_of_the_build_is_known_by_what_it_needs() -> None:
    assert set(_native.kernels()) == set(ISAS)
