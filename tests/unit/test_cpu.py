"""What the C++ part says of this CPU agrees with what the kernel says of it."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pellucid import _native
from pellucid.cpu import detect_cpu

CPUINFO = Path("/proc/cpuinfo")
# where Linux spells a feature differently
ARM_NAMES = {"neon": "asimd", "fp16": "asimdhp", "dotprod": "asimddp"}


def test_the_architecture_is_the_one_that_this_python_runs_on() -> None:
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(
        platform.machine().lower(), platform.machine()
    )
    assert detect_cpu().architecture in (machine, "unknown")


@pytest.mark.skipif(not CPUINFO.is_file(), reason="no /proc/cpuinfo to compare with")
def test_each_feature_is_usable_exactly_where_the_kernel_lists_it() -> None:
    lines = (line.partition(":") for line in CPUINFO.read_text().splitlines())
    listed = {
        word
        for key, _, value in lines
        if key.strip() in ("flags", "Features")
        for word in value.split()
    }
    reported = _native.cpu_features()
    assert reported == {name: ARM_NAMES.get(name, name) in listed for name in reported}


@pytest.mark.skipif(
    _native.cpu_architecture() == "unknown", reason="nothing is known of this architecture"
)
def test_a_detected_cpu_lists_the_usable_features_in_words() -> None:
    cpu = detect_cpu()
    assert set(cpu.features) == {name for name, usable in _native.cpu_features().items() if usable}
    assert all(feature in str(cpu) for feature in cpu.features)


@pytest.mark.slow
def test_a_cpu_without_avx512_loads_the_kernels_that_it_can_run() -> None:
    """Valgrind is such a CPU: an instruction of AVX-512 ends the process there."""
    if _native.cpu_architecture() != "x86_64":
        pytest.skip("these kernels are for x86-64")
    if (valgrind := shutil.which("valgrind")) is None:
        pytest.skip("there is no valgrind")
    code = (
        "import pellucid.backends.native.backend as native\n"
        "from pellucid import _native\n"
        "print(native.choose_isa(None), _native.encoders()[0])"
    )
    done = subprocess.run(
        [valgrind, "--tool=none", "--quiet", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() in (["avx2", "avx2"], ["portable", "portable"])
