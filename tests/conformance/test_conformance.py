"""Every backend, on every case, against the formula evaluated in float64: within the budget of
`pellucid/ops/budget.py`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.backends.registry import BACKENDS, get_backend
from pellucid.errors import ConfigError
from pellucid.formats import ALL_FORMATS
from pellucid.ops.build_case import build_case
from pellucid.ops.case_lists import CASES, SPEED_CASES
from pellucid.ops.cases import AttentionCase, Case, LinearCase
from pellucid.ops.protocol import Ops

from .harness import check_case

# backends that multiply quantized weights in float32 are held to the dense budget there too
FLOAT32_ACTIVATIONS = {"reference"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_backend_computes_the_formula_within_the_budget(backend: str, case: Case) -> None:
    built = get_backend(backend)
    if isinstance(case, AttentionCase) and backend == "native" and case.block_size % 16:
        with pytest.raises(ConfigError, match="multiple of 16"):
            build_case(built, case, case.build_inputs())
        return
    check_case(built, case, float32_activations=backend in FLOAT32_ACTIVATIONS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_forward_pass_can_be_run_again_and_its_result_is_the_callers(backend: str) -> None:
    case = LinearCase(tokens=3, in_features=64, out_features=8)
    inputs = case.build_inputs()
    run = build_case(get_backend(backend), case, inputs)
    first = run()
    kept = first.copy()
    first[:] = np.nan
    assert np.array_equal(run(), kept)


class _Recorder:
    """An Ops that notes which ops are called and passes them on."""

    def __init__(self, ops: Ops, called: set[str]) -> None:
        self._ops = ops
        self._called = called

    def __getattr__(self, name: str) -> Callable[..., Any]:
        self._called.add(name)
        function: Callable[..., Any] = getattr(self._ops, name)
        return function


def test_every_op_of_the_vocabulary_is_exercised_by_some_case() -> None:
    called: set[str] = set()

    class Recording(ReferenceBackend):
        def build_forward(self, forward: Any) -> Any:
            return super().build_forward(lambda ops, batch: forward(_Recorder(ops, called), batch))

    for case in CASES:
        build_case(Recording(), case, case.build_inputs())()
    assert called == {name for name in vars(Ops) if not name.startswith("_")}


def test_every_format_has_an_embedding_and_a_linear_case() -> None:
    for op in ("embedding", "linear"):
        assert {getattr(case, "format", None) for case in CASES if case.op == op} == set(
            ALL_FORMATS
        )


def test_a_name_says_all_about_a_case() -> None:
    for case in CASES + SPEED_CASES:
        assert [
            other for other in CASES + SPEED_CASES if other.name == case.name and other != case
        ] == []
    assert len(set(CASES)) == len(CASES) and len(set(SPEED_CASES)) == len(SPEED_CASES)


def test_inputs_come_from_the_name_alone() -> None:
    for case in CASES[:: len(CASES) // 20]:
        a, b = case.build_inputs(), case.build_inputs()
        assert all(
            np.array_equal(a.activations[name], b.activations[name]) for name in a.activations
        )
        assert all(np.array_equal(a.weights[name].data, b.weights[name].data) for name in a.weights)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_backend_answers_for_its_device(name: str) -> None:
    backend = get_backend(name)
    assert backend.name == name and backend.device in backend.devices
    assert backend.dtypes[0] == "float32" and "f32" in backend.kv_dtypes
    assert 16 % backend.block_multiple == 0 and backend.default_max_num_seqs >= 1
    assert backend.available_memory() > 1 << 20


def test_an_option_that_a_backend_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(ConfigError, match=r"no option 'thread'; did you mean 'threads'\?.*isa"):
        get_backend("native", {"thread": 2})
    with pytest.raises(ConfigError, match="the reference backend has no option 'threads'; it has"):
        get_backend("reference", {"threads": 2})


def test_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"backend is 'cuda'; it must be one of: .*reference"):
        get_backend("cuda")
