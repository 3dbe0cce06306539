"""The few layers that predict a model's speed here: they run in its shape, and so does Python."""

from pathlib import Path

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.costs import StepShape
from pellucid.measure.headers import read_headers
from pellucid.measure.kernel_times import COPIES, load_few_layers, measure_kernel_times
from pellucid.measure.plan import build_memory_plan
from pellucid.measure.step_overhead import measure_step_overhead


def test_few_layers_give_every_op_of_the_model_a_time(tiny_path: Path) -> None:
    backend = NativeBackend(threads=2)
    program = build_memory_plan(read_headers(tiny_path), backend, ctx=64).program
    few = load_few_layers(program, backend)
    assert few is not None
    assert few.program.config.num_layers % COPIES == 0
    times = measure_kernel_times(few, backend, StepShape((1, 1), (40, 64), 2))
    assert times is not None
    assert len(times.seconds) == len(program.items)
    assert all(seconds > 0 for seconds in times.seconds)


def test_the_time_outside_the_ops_is_measured_for_any_number_of_requests(tiny_path: Path) -> None:
    backend = NativeBackend(threads=2)
    program = build_memory_plan(read_headers(tiny_path), backend, ctx=64).program
    few = load_few_layers(program, backend)
    assert few is not None
    for requests in (1, 8, 200):  # the last is more than are run
        assert measure_step_overhead(few, backend, requests) > 0
