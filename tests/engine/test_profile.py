"""`pellucid profile`: the ledger closes, its figures are the costs of the ops, its files open."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.backends.native.costs import StepShape
from pellucid.backends.native.program import CapturedForward
from pellucid.cli.main import main
from pellucid.engine.admission import Submission
from pellucid.engine.loader import Engine, build_engine
from pellucid.engine.options import build_engine_config
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.measure.profile import Line, Profile, profile_model
from pellucid.measure.report import draw_roofline, plot_roofline, write_trace
from pellucid.measure.roofline import total
from pellucid.ops.cost import OpCost
from pellucid.sampling_params import SamplingParams

pytestmark = pytest.mark.slow  # each measures


@pytest.fixture(scope="module")
def profile(tiny_path: Path) -> Profile:
    return profile_model(tiny_path, prompt=40, output=8, batch=2, options={"threads": 2})


def test_the_parts_of_each_phase_add_up_to_its_wall_time(profile: Profile) -> None:
    assert [phase.name for phase in profile.phases] == ["prefill", "decode"]
    for phase in profile.phases:
        parts = phase.op_seconds + phase.python_seconds + phase.unaccounted_seconds
        assert parts == pytest.approx(phase.wall_seconds)
        assert sum(line.seconds for line in phase.groups) == pytest.approx(phase.op_seconds)
        assert phase.unaccounted_seconds > 0
        assert all(line.seconds > 0 for line in phase.ops)


def test_the_costs_of_a_phase_are_those_of_its_steps(profile: Profile) -> None:
    prefill, decode = profile.phases
    assert prefill.num_tokens == 3 * 2 * 40 and decode.num_tokens == 3 * 2 * 7
    shapes = [StepShape((1, 1), (41 + i, 41 + i), 2) for i in range(7)] * 3
    assert decode.cost == total([total(profile.program.costs(shape)) for shape in shapes])
    assert total([line.cost for line in decode.ops]) == decode.cost
    assert total([line.cost for line in decode.groups]) == decode.cost


def test_every_op_and_every_layer_has_a_name(profile: Profile) -> None:
    names = {line.name for line in profile.phases[0].ops}
    assert {"q_proj", "down_proj", "lm_head", "attention", "embed", "kv_write"} <= names
    assert [line.name for line in profile.phases[0].groups] == ["embedding", "layers", "head"]


def test_the_ledger_is_off_unless_it_is_asked_for_and_changes_no_token(tiny_path: Path) -> None:
    def run(engine: Engine) -> list[int]:
        prompt = TokenizedPrompt([*b"the ledger"], None)
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        engine.core.add_requests([Submission("a", prompt, params)])
        while engine.core.has_unfinished:
            (output,) = engine.core.step()
        return output.outputs[0].token_ids

    options = {"enable_prefix_caching": False, "speculative": None}
    engine = build_engine(tiny_path, build_engine_config(options))
    forward = engine.core.runner.forward
    assert isinstance(forward, CapturedForward)
    assert forward.ledger is None
    without = run(engine)
    forward.ledger = []
    assert run(engine) == without
    assert len(forward.ledger) == 12
    for step in forward.ledger:
        assert np.all(step.seconds >= 0) and step.seconds.sum() > 0
    assert forward.ledger[-1].shape == StepShape([1], [21], 1)


def test_the_trace_is_chromes_format(profile: Profile, tmp_path: Path) -> None:
    write_trace(profile, tmp_path / "out.json")
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    complete = [event for event in events if event["ph"] == "X"]
    assert len(complete) == sum(
        len(phase.steps) * (6 + len(profile.program.items)) for phase in profile.phases
    )
    assert all(event["ts"] >= 0 and event["dur"] >= 0 for event in complete)
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} >= {"steps", "ops"}


def test_a_wait_before_the_engine_begins_makes_no_time_negative(
    profile: Profile, tmp_path: Path
) -> None:
    (first, *others) = profile.phases
    steps = tuple(replace(step, start=step.start - 1) for step in first.steps)
    waited = replace(profile, phases=(replace(first, steps=steps), *others))
    write_trace(waited, tmp_path / "out.json")
    events = json.loads((tmp_path / "out.json").read_text())["traceEvents"]
    assert min(event["dur"] for event in events if event["ph"] == "X") >= 0


def test_the_plot_shows_both_phases(profile: Profile, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_roofline(profile, tmp_path / "roofline.svg")
    assert "<svg" in (tmp_path / "roofline.svg").read_text()


def test_no_name_in_the_plot_covers_another(profile: Profile) -> None:
    pytest.importorskip("matplotlib.figure")
    import matplotlib

    figure = matplotlib.figure.Figure(figsize=(9, 6))
    # twenty ops at one place, and as many a little further
    cost = OpCost(3_000_000, 500_000, 500_000)
    ops = tuple(
        Line(f"operation {i}", 1, 1e-3 * (1 + i // 20), cost, 1e-4, 1e-4) for i in range(40)
    )
    phases = tuple(replace(phase, ops=ops, wall_seconds=0.04) for phase in profile.phases)
    draw_roofline(replace(profile, phases=phases), figure)
    figure.draw_without_rendering()
    names = [t for t in figure.axes[0].texts if t.get_text().startswith("operation")]
    assert len(names) == 80
    boxes = [matplotlib.text.Text.get_window_extent(name) for name in names]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i]), names[i].get_text()


@pytest.mark.slow
def test_the_command_prints_a_table_or_one_line_of_json(tiny_path: Path) -> None:
    command = ["profile", str(tiny_path), "--prompt", "32", "--output", "4"]
    shown = CliRunner().invoke(main, command)
    assert shown.exit_code == 0, shown.output
    for word in ("prefill", "decode", "unaccounted", "Python", "FLOP/byte", "of roof", "bound by"):
        assert word in shown.output
    found = CliRunner().invoke(main, [*command, "--json"])
    report = json.loads(found.output.splitlines()[-1])
    for phase in report["phases"].values():
        shares = phase["ops_share"] + phase["python_share"] + phase["unaccounted_share"]
        assert shares == pytest.approx(1)
        assert sum(op["flops"] for op in phase["ops"]) > 0


@pytest.mark.parametrize(
    "options, sentence",
    [
        (["--kv-dtype", "int3"], "kv_cache_dtype is 'int3'"),
        (["--trace", "/no/such/folder/x.json"], "there is no folder"),
        (["--prompt", "90", "--output", "90"], "max_model_len is 180"),
        (["--isa", "sse"], "isa is 'sse'"),
    ],
)
def test_what_cannot_be_profiled_is_told_in_one_sentence(
    tiny_path: Path, options: list[str], sentence: str
) -> None:
    shown = CliRunner().invoke(main, ["profile", str(tiny_path), *options])
    assert shown.exit_code == 1
    assert sentence in shown.output and len(shown.output.strip().splitlines()) == 1
