"""Runs random programs and batches through `_native` as a hostile caller would: random forward
passes are captured, some parts of the program or of the batch are changed, and each must either be
refused or run within its memory.

    python native_fuzzer.py SEED PROGRAMS

It runs in a process of its own (test_native_fuzz.py), which a write beyond an array may end. The
result array lies between two guards, whose bytes must not change. Memory of C++ is guarded by the
sanitizers in csrc/tests/fuzz_programs.cpp, which draws programs likewise.
"""

import copy
import sys
from typing import Any

import numpy as np

from pellucid import _native
from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.capture import OPS, capture
from pellucid.backends.native.kv_store import KVStore
from pellucid.backends.native.plan import build_plan

from .random_forward import TOKENS, batch_of, random_forward

GUARD = 4096  # numbers on each side of a result
GUARD_VALUE = np.float32(-12345.5)
INTS = (-(2**31), -1, 0, 1, 2, 7, 16, 31, 32, 64, 1000, 2**30, 2**31 - 1)
REFUSALS = (ValueError, IndexError, TypeError, MemoryError)

Program = dict[str, Any]


def captured(seed: int) -> Program:
    """A program of a random forward pass, as the calls that build it."""
    captured = capture(random_forward(seed, num_ops=8))
    entries, plan = captured.entries, build_plan(captured)
    return {
        "buffers": [(p.offset, p.width, p.quantized, int(p.rows)) for p in plan.buffers],
        "bytes_per_token": plan.bytes_per_token,
        "output": plan.output,
        "hidden": plan.hidden,
        "entries": [
            {
                "op": entry.op,
                "inputs": [plan.index[s.storage] for s in entry.inputs],
                "output": -1 if entry.output is None else plan.index[entry.output.storage],
                "weight": entry.weight,
                "vectors": list(entry.vectors),
                "kv": entry.kv.native if isinstance(entry.kv, KVStore) else None,
                "barrier": barrier,
                "attributes": dict(entry.attributes),
            }
            for entry, barrier in zip(entries, plan.barriers, strict=True)
        ],
    }


def mutate(program: Program, rng: np.random.Generator) -> None:
    """Change one thing of a program, in place."""
    entries = program["entries"]
    entry, other = (entries[rng.integers(len(entries))] for _ in range(2))
    number = int(rng.choice(INTS))
    match rng.integers(11):
        case 0:  # the result lies elsewhere: in the caller's memory
            name = str(rng.choice(["output", "hidden"]))
            program[name] = int(rng.integers(-1, len(program["buffers"])))
        case 1:
            at = rng.integers(len(program["buffers"]))
            buffer = list(program["buffers"][at])
            field = rng.integers(4)
            if field < 2:
                buffer[field] = max(number, 0)
            else:
                buffer[field] = not buffer[field] if field == 2 else int(rng.integers(-1, 4))
            program["buffers"][at] = tuple(buffer)
        case 2:
            program["bytes_per_token"] = max(number, 0)
        case 3 if entry["inputs"]:
            at = rng.integers(len(entry["inputs"]))
            entry["inputs"][at] = int(rng.integers(len(program["buffers"])))
        case 4:
            entry["output"] = int(rng.integers(-1, len(program["buffers"])))
        case 5 if entry["attributes"]:
            entry["attributes"][str(rng.choice([*entry["attributes"]]))] = number
        case 6:
            name = str(rng.choice(["heads", "width", "inv_freq", "nothing"]))
            entry["attributes"][name] = [1.0] if rng.random() < 0.5 else number
        case 7:
            entry["weight"], entry["vectors"] = other["weight"], other["vectors"]
        case 8:
            entry["kv"] = other["kv"]
        case 9:
            entry["op"] = str(rng.choice([*OPS, "nothing"]))
        case _:
            entries[:] = [entries[i] for i in rng.permutation(len(entries))]


def arrays_of(rng: np.random.Generator) -> list[Any]:
    """The arguments of a run, half of the time with one wrong number or shape."""
    batch = batch_of(int(rng.integers(1, TOKENS + 1)))
    a = batch.attention
    arrays = [
        batch.input_ids,
        batch.positions,
        batch.logits_indices,
        batch.hidden_indices,
        a.cu_seqlens_q,
        a.seq_lens,
        a.block_tables,
        a.slot_mapping,
    ]
    if rng.random() < 0.5:
        at = rng.integers(len(arrays))
        changed = arrays[at].copy()
        if changed.size and rng.random() < 0.7:
            changed.flat[rng.integers(changed.size)] = rng.choice(INTS)
        else:
            changed = changed[..., :-1].copy()
        arrays[at] = changed
    return arrays


def attempt(program: Program, pool: "_native.ThreadPool", rng: np.random.Generator) -> bool:
    """Build a program and run it; False where it is refused."""
    isa = NativeBackend(threads=1).isa
    try:
        built = _native.new_program(
            isa,
            pool,
            program["buffers"],
            program["bytes_per_token"],
            program["output"],
            program["hidden"],
            [tuple(entry.values()) for entry in program["entries"]],
        )
    except REFUSALS:
        return False
    results = [program[name] for name in ("output", "hidden") if program[name] >= 0]
    shapes = [program["buffers"][result] for result in results]
    if any(width > 1 << 16 for _, width, *_ in shapes):
        return False
    ran = False
    for _ in range(3):
        arrays = arrays_of(rng)
        memories, views = [], []
        for _, width, _, rows in shapes:
            count = len(arrays[(0, 2, 3)[rows]])
            memory = np.full(count * width + 2 * GUARD, GUARD_VALUE, np.float32)
            views.append(memory[GUARD : GUARD + count * width].reshape(count, width))
            memories.append((memory, GUARD + count * width))
        try:
            arguments: list[Any] = [*arrays, *views]
            built.run(*arguments)
            ran = True
        except REFUSALS:
            pass
        for memory, end in memories:
            guards = np.concatenate([memory[:GUARD], memory[end:]])
            assert (guards == GUARD_VALUE).all(), "a run wrote beyond its result"
    return ran


def main(seed: int, programs: int) -> None:
    rng = np.random.default_rng(seed)
    pools = [_native.ThreadPool(n) for n in (1, 2)]
    bases = [captured(int(s)) for s in rng.integers(1 << 30, size=8)]
    ran = 0
    for _ in range(programs):
        # the parts are shared, the lists are not
        base = bases[rng.integers(len(bases))]
        program = {
            **base,
            "buffers": list(base["buffers"]),
            "entries": [
                {k: copy.copy(v) if isinstance(v, list | dict) else v for k, v in entry.items()}
                for entry in base["entries"]
            ],
        }
        for _ in range(rng.integers(0, 4)):
            mutate(program, rng)
        ran += attempt(program, pools[rng.integers(2)], rng)
    print(ran)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
