"""The loops that measure peaks keep their sums in registers: the machine code of the built module
is read. A loop that stores and loads them measures L1, not the multipliers.
"""

import platform
import re
import shutil
import subprocess
from functools import cache

import pytest

from pellucid import _native

pytestmark = pytest.mark.slow  # each test disassembles the module

# Per instruction set: what a loop must multiply with, how often at least, and what else it may do.
# `count` is of the sums in simd/*.h. The portable kernels are left out: their vectors are arrays,
# and which of them lie in registers is the compiler's choice. Arm's have other instructions.
LOOPS = {
    "avx512 int8": ("vpdpbusd", "zmm", 12, {"vpbroadcastd"}),
    "avx512 float32": (r"vfmadd\d+ps", "zmm", 12, {"vbroadcastss"}),
    "avx2 int8": ("vpmaddubsw", "ymm", 32, {"vpaddw", "vpmaddwd", "vpaddd", "vpbroadcastd"}),
    "avx2 float32": (r"vfmadd\d+ps", "ymm", 10, {"vbroadcastss"}),
    "amx int8": ("tdpbsud", "tmm", 4, set()),
}
COUNTING = {"add", "sub", "inc", "dec", "cmp", "test", "jne", "jb", "ja", "lea", "mov"}
MOVES = {"movaps", "vmovaps", "vmovdqa", "vmovdqa32", "vmovdqa64", "movdqa"}  # between registers


@cache
def loops() -> list[list[tuple[str, str]]]:
    """Every short loop of the module without an inner one: (operation, operands) of each line."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the loops are told by instructions of x86-64")
    if (objdump := shutil.which("objdump")) is None:
        pytest.skip("there is no objdump (binutils)")
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", _native.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found: list[list[tuple[str, str]]] = []
    at: dict[int, int] = {}
    code: list[tuple[str, str]] = []
    last_jump = -1
    for line in listing.splitlines():
        match = re.match(r"\s*([0-9a-f]+):\s+(\S+)\s*(.*)", line)
        if match is None:
            continue
        address, operation, operands = int(match[1], 16), match[2], match[3]
        at[address] = len(code)
        code.append((operation, operands))
        if operation.startswith("j"):
            target = re.match(r"[0-9a-f]+", operands)
            begin = at.get(int(target[0], 16), -1) if target else -1
            if last_jump < begin and len(code) - begin < 100:
                found.append(code[begin:])
            last_jump = len(code) - 1
    return found


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_that_measures_a_peak_keeps_its_sums_in_registers(name: str) -> None:
    multiply, register, count, beside = LOOPS[name]
    if name.split()[0] not in _native.kernels():
        pytest.skip("this build has no such kernels")

    def is_pure(body: list[tuple[str, str]]) -> bool:
        """Products of registers, numbers from L1, and the count of rounds. No store: a sum that
        is spilled is stored, a number that is multiplied may be loaded again.
        """
        products = 0
        for operation, operands in body:
            if re.fullmatch(multiply, operation) and register in operands:
                products += 1
            elif operation not in COUNTING | beside and not (
                operation in MOVES and not operands.endswith(")")
            ):
                return False
            if ("%rsp" in operands or "%rbp" in operands) and operation not in MOVES:
                return False
        return products >= count

    assert any(is_pure(body) for body in loops()), (
        f"no loop of {multiply} alone is in the module: the compiler has spilled the sums of "
        "csrc/kernels/ceilings.inc to the stack"
    )
