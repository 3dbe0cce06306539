"""`measure/machine.py` and `pellucid machine`: what is measured, how it is kept, and what makes it
void.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pellucid import _native
from pellucid.backends.native.backend import choose_isa
from pellucid.cli import machine as command
from pellucid.cli.main import main
from pellucid.errors import PellucidError
from pellucid.measure import machine as machine_module
from pellucid.measure.machine import (
    Machine,
    ReadMeter,
    fingerprint,
    load_machine,
    machine_json,
    measure_ceilings,
    measure_machine,
    save_machine,
)
from pellucid.ops.cost import OpCost

pytestmark = pytest.mark.slow  # each measures

SIZES = (1 << 20, 1 << 22)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    folder = tmp_path_factory.mktemp("models")
    found = measure_machine(seconds=0.1, working_sets=SIZES, folder=folder)
    assert not list(folder.iterdir())
    return found


def test_every_figure_is_a_range_of_at_least_three_readings(measured: Machine) -> None:
    ranges = [
        *(r for by in measured.read_bandwidth.values() for r in by.values()),
        *(r for isa in measured.peaks.values() for by in isa.values() for r in by.values()),
        *measured.barrier_seconds.values(),
        *([measured.disk_bandwidth] if measured.disk_bandwidth else []),
    ]
    assert all(0 < r.least <= r.median <= r.most and r.readings >= 3 for r in ranges)
    assert all(list(by) == list(SIZES) for by in measured.read_bandwidth.values())
    assert {"portable", choose_isa(None)} <= set(measured.peaks)
    # of all threads but one, which meets nobody
    assert [*measured.read_bandwidth][1:] == [*measured.barrier_seconds]


def test_the_ceilings_of_a_number_of_threads_come_from_the_nearest_below(measured: Machine) -> None:
    isa = choose_isa(None)
    most = max(measured.read_bandwidth)
    found = measured.ceilings(isa, most + 5)
    assert (found.isa, found.threads, found.is_measured) == (isa, most, True)
    assert found.int8_peak == measured.peaks[isa][most]["int8"].most
    assert measured.ceilings(isa, 1).threads == 1
    with pytest.raises(PellucidError, match="isa 'mmx' was not measured: it can be"):
        measured.ceilings("mmx", 1)


def test_what_was_measured_is_kept_until_the_machine_changes(
    measured: Machine, tmp_path: Path
) -> None:
    path = tmp_path / "cache" / "machine.json"
    with pytest.raises(PellucidError, match="was not measured yet"):
        load_machine(path)
    save_machine(measured, path)
    assert load_machine(path) == measured
    assert [found.name for found in path.parent.iterdir()] == [path.name]
    for name in fingerprint():
        changed = replace(measured, fingerprint={**measured.fingerprint, name: "other"})
        save_machine(changed, path)
        with pytest.raises(PellucidError, match=f"has changed since it was measured: {name}$"):
            load_machine(path)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"fingerprint": 3}', "{" * 10000])
def test_a_file_that_is_broken_is_measured_again(text: str, tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(PellucidError, match="cannot be used"):
        load_machine(tmp_path / "machine.json")


WRONG: list[Any] = [None, "x", -1, 0, [], {}, True, 3.5, 1e300, "9" * 30, {"least": 1}]


def places(value: object, here: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every value in a JSON object, itself left out."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*here, key)
            yield from places(inner, (*here, key))


def test_a_file_with_any_wrong_value_is_refused_or_can_be_used(
    measured: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each value in turn is missing, or of a wrong type or size. Nothing may fail later."""
    now = fingerprint()
    monkeypatch.setattr(machine_module, "fingerprint", lambda: now)  # reads the module's file
    path = tmp_path / "machine.json"
    refused = 0
    for keys in places(json.loads(machine_json(measured))):
        for wrong in ("missing", *WRONG):
            broken = json.loads(machine_json(measured))
            inner = broken
            for key in keys[:-1]:
                inner = inner[key]
            if wrong == "missing":
                del inner[keys[-1]]
            else:
                inner[keys[-1]] = wrong
            path.write_text(json.dumps(broken))
            try:
                found = load_machine(path)
            except PellucidError:
                refused += 1
                continue
            for isa, by in found.peaks.items():
                for threads in by:
                    ceilings = found.ceilings(isa, threads)
                    assert 0 < ceilings.least_seconds(OpCost(1, 1, 1, int8_flops=1), 1) < math.inf
            with CliRunner().isolation():
                command._print(found)
    assert refused > 300


def test_the_command_measures_once(
    measured: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs = []

    def count(**_: object) -> Machine:
        runs.append(1)
        return measured

    monkeypatch.setattr(machine_module, "measure_machine", count)
    first = CliRunner().invoke(main, ["machine"])
    assert first.exit_code == 0 and "was not measured yet: measuring" in first.stderr
    assert "read, GB/s" in first.stdout and "scales of Q4_0" in first.stdout
    again = CliRunner().invoke(main, ["machine", "--json"])
    assert json.loads(again.stdout)["fingerprint"] == fingerprint() and not again.stderr
    assert len(runs) == 1
    assert CliRunner().invoke(main, ["machine", "--refresh"]).exit_code == 0
    assert len(runs) == 2


def test_a_cache_that_cannot_be_written_is_told_and_the_figures_are_shown(
    measured: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    for place, reason in ((in_the_way, "Not a directory"), (Path("/proc/sys"), "")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(place))
        monkeypatch.setattr(machine_module, "measure_machine", lambda **_: measured)
        done = CliRunner().invoke(main, ["machine", "--json"])
        assert done.exit_code == 0 and json.loads(done.stdout)["fingerprint"] == fingerprint()
        assert f"the figures are not kept: {place}/pellucid/machine.json: {reason}" in done.stderr


def test_a_meter_reads_in_turns_with_the_work() -> None:
    isa = choose_isa(None)
    meter = ReadMeter(isa, 1, 1 << 20, seconds=0.005)
    rates = [meter.take() for _ in range(5)]
    assert (meter.range.least, meter.range.most, meter.range.readings) == (
        min(rates),
        max(rates),
        5,
    )
    ceilings = measure_ceilings(isa, 1, working_sets=[1 << 21], seconds=0.005)
    assert meter.applied_to(ceilings).bandwidth_range(1 << 20) == meter.range


def test_impossible_measures_are_refused() -> None:
    pool = _native.ThreadPool(2)
    with pytest.raises(ValueError, match="a working set has no size, or too much"):
        _native.ReadBuffer(pool, 0)
    buffer = _native.ReadBuffer(pool, 1)
    with pytest.raises(ValueError, match="measuring takes more than 0 and at most 60 s"):
        buffer.read("portable", pool, 1, 0.0)
    with pytest.raises(ValueError, match="no kernels of that name"):
        buffer.read("mmx", pool, 1, 0.01)
    with pytest.raises(ValueError, match="more threads than memory"):
        buffer.read("portable", _native.ThreadPool(3), 1, 0.01)
    with pytest.raises(ValueError, match="barriers are 1 to 1,000,000"):
        _native.measure_barrier(pool, 0)


def test_the_kernels_are_hashed_once() -> None:
    """Every explanation asks for the fingerprint, and the hash takes milliseconds."""
    machine_module._kernels.cache_clear()
    assert fingerprint() == fingerprint()
    assert machine_module._kernels.cache_info().misses == 1
