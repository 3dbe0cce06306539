"""The ledger of a captured program, counted by hand, and `pellucid inspect --program`, on a tiny
GGUF file; the machine's ceilings.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.capture import OPS, Entry, Rows, Symbol, capture
from pellucid.backends.native.costs import StepShape, entry_cost
from pellucid.cli.main import main
from pellucid.formats import encode_dense, quantize
from pellucid.kv_spec import KVSpec
from pellucid.measure.hardware import Ceilings, Range
from pellucid.measure.machine import measure_ceilings
from pellucid.models.registry import get_graph
from pellucid.ops import cost
from pellucid.ops.cost import OpCost
from pellucid.ops.protocol import KVLayer
from pellucid.weights.checkpoint import open_checkpoint
from pellucid.weights.gguf_writer import write_gguf

C, F, V, LAYERS, HEADS, KV_HEADS, D = 64, 96, 40, 2, 4, 2, 16
KV = KV_HEADS * D
SPEC = KVSpec(KV_HEADS, D, D, "f16", "f16")
SHAPES = {"attn_q": (C, C), "attn_k": (KV, C), "attn_v": (KV, C), "attn_output": (C, C)}
SHAPES |= {"ffn_gate": (F, C), "ffn_up": (F, C), "ffn_down": (C, F)}


def rand(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, with its embedding tied to the logits."""
    said: dict[str, object] = {
        "general.architecture": "llama",
        "llama.context_length": 64,
        "llama.embedding_length": C,
        "llama.block_count": LAYERS,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 10000.0,
    }
    tensors = [
        ("token_embd.weight", quantize(rand(V, C), "Q8_0")),
        ("output_norm.weight", encode_dense(rand(C))),
    ]
    for i in range(LAYERS):
        tensors += [
            (f"blk.{i}.{name}.weight", quantize(rand(*shape), "Q4_0"))
            for name, shape in SHAPES.items()
        ]
        tensors += [
            (f"blk.{i}.{name}.weight", encode_dense(rand(C))) for name in ("attn_norm", "ffn_norm")
        ]
    path = tmp_path_factory.mktemp("program") / "tiny.gguf"
    write_gguf(path, said, tensors)
    return path


def invoke(*arguments: str | Path | int) -> str:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def report(path: Path, tokens: int) -> dict[str, Any]:
    found = json.loads(invoke(path, "--program", "--tokens", tokens, "--json"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_the_linear_layers_of_a_step_cost_what_the_model_says(tiny: Path, tokens: int) -> None:
    found = report(tiny, tokens)
    linear = [entry for entry in found["entries"] if entry["op"] == "linear"]
    assert len(linear) == LAYERS * len(SHAPES) + 1
    weights = LAYERS * sum(math.prod(shape) for shape in SHAPES.values())
    # logits of one row alone
    assert sum(entry["flops"] for entry in linear) == 2 * tokens * weights + 2 * V * C
    # 8 bits, and 16 bytes per 32 inputs
    codes = sum(tokens * k * 1.5 for _, k in SHAPES.values()) * LAYERS + C * 1.5
    results = (sum(tokens * n for n, _ in SHAPES.values()) * LAYERS + V) * 4
    assert (
        sum(entry["bytes"] for entry in linear)
        == weights * 18 // 32 + V * C * 34 // 32 + codes + results
    )


def test_totals_are_the_sums_of_the_entries_and_grow_with_the_tokens(tiny: Path) -> None:
    one, many = report(tiny, 1), report(tiny, 64)
    for found in (one, many):
        for key in ("flops", "bytes"):
            assert found["total"][key] == sum(entry[key] for entry in found["entries"]) > 0
        assert found["total"]["arithmetic_intensity"] == pytest.approx(
            found["total"]["flops"] / found["total"]["bytes"]
        )
        of_bytes = found["total"]["int8_flops"]
        arithmetic = (
            of_bytes / found["int8_peak"]
            + (found["total"]["flops"] - of_bytes + found["total"]["scale_flops"])
            / found["float_peak"]
        )
        least = max(arithmetic, found["total"]["bytes"] / found["read_bandwidth"])
        assert found["least_seconds"] == pytest.approx(least) and least > 0
    assert many["total"]["arithmetic_intensity"] > 3 * one["total"]["arithmetic_intensity"]
    assert many["arena_bytes"] == 64 * one["arena_bytes"]


def test_entries_name_their_op_their_weight_and_whether_threads_wait(tiny: Path) -> None:
    entries = report(tiny, 3)["entries"]
    assert [entry["index"] for entry in entries] == list(range(len(entries)))
    first, last = entries[0], entries[-1]
    assert (first["op"], first["weight"], first["of"]) == (
        "embed",
        f"Q8_0 {V} × {C}",
        "embed_tokens.weight",
    ) and not first["barrier"]
    assert (last["op"], last["rows"], last["width"], last["of"]) == (
        "linear",
        1,
        V,
        "embed_tokens.weight",
    )
    down = next(entry for entry in entries if entry["of"] == "layers.1.down_proj.weight")
    assert (down["rows"], down["width"], down["weight"]) == (3, C, f"Q4_0 {C} × {F}") and down[
        "barrier"
    ]
    attention = [entry for entry in entries if entry["op"] == "attention"]
    assert [entry["of"] for entry in attention] == [f"{KV_HEADS} KV heads of {D}"] * LAYERS


def test_people_get_one_line_per_entry_and_the_roofline(tiny: Path) -> None:
    text = invoke(tiny, "--program", "--tokens", 5)
    table, summary = text.split("\n\n")
    entries = report(tiny, 5)["entries"]
    assert len(table.splitlines()) == len(entries) + 1
    assert sum(" wait " in line for line in table.splitlines()) == sum(
        entry["barrier"] for entry in entries
    )
    assert (
        summary.startswith(f"{len(entries)} entries, ")
        and "a step takes at least " in summary
        and " GB/s read from " in summary
    )


def test_a_step_of_no_tokens_is_refused(tiny: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", str(tiny), "--program", "--tokens", "0"])
    assert result.exit_code == 2 and "--tokens" in result.stderr


def test_entries_without_weights_are_counted_as_their_ops() -> None:
    x, heads = Symbol(64), Symbol(64, num_heads=4)
    step = StepShape((3, 1), (3, 20), 2)
    assert entry_cost(Entry("add", [x, x], Symbol(64)), step) == cost.add(4, 64)
    assert entry_cost(
        Entry("rms_norm", [heads], heads, attributes={"width": 16, "eps": 1e-6}), step
    ) == cost.rms_norm(16, 16)
    assert entry_cost(Entry("take_rows", [x], Symbol(64, Rows.LOGITS)), step) == cost.take_rows(
        2, 64
    )
    # 4 tokens: 64 numbers read as float32, written as 64 codes and two groups of 16 bytes
    assert entry_cost(Entry("quantize", [x], Symbol(64, quantized=True)), step) == OpCost(
        4 * 64 * 6, 4 * 256, 4 * 96
    )


def test_turning_by_angles_and_the_angles_together_do_the_work_of_rope() -> None:
    step, angles, x = StepShape((5,), (9,), 1), Symbol(16), Symbol(64, num_heads=4)
    both = [
        Entry("rope_angles", [], angles, attributes={"scale": 1.0, "inv_freq": (0.5,) * 8}),
        Entry(
            "rope", [x, angles], Symbol(64, num_heads=4), attributes={"heads": 4, "head_dim": 16}
        ),
    ]
    assert sum(entry_cost(entry, step).flops for entry in both) == cost.rope(5, 4, 16, 16).flops


def test_attention_reads_a_cache_of_float16_within_its_window() -> None:
    kv = NativeBackend(threads=1).new_kv_store(4, 16, SPEC)
    x, step = Symbol(HEADS * D, num_heads=HEADS), StepShape((1, 4), (50, 4), 2)
    attributes = {"heads": HEADS, "head_dim": D, "window": 8, "group": 0, "scale": 0.25, "cap": 0.0}
    found = entry_cost(
        Entry("attention", [x], Symbol(HEADS * D), kv=kv, attributes=attributes), step
    )
    assert found == cost.attention(
        [1, 4],
        [50, 4],
        num_heads=HEADS,
        num_kv_heads=KV_HEADS,
        head_dim=D,
        window=8,
        kv_token_bytes=4 * KV,
    )
    assert entry_cost(
        Entry("kv_write", [x, x], None, kv=kv, attributes={"group": 0}), step
    ) == cost.kv_write(5, KV_HEADS, D, kv_token_bytes=4 * KV)


def test_every_op_of_a_program_has_a_cost() -> None:
    """An op that nobody counts is an error, not a zero."""
    backend = NativeBackend(threads=1)
    weight, kv = (
        backend.load_weight(quantize(rand(64, 64), "Q8_0")),
        backend.new_kv_store(1, 16, SPEC),
    )
    x = Symbol(64, num_heads=HEADS)
    for op, (_, names) in OPS.items():
        attributes = {name: {"heads": HEADS, "head_dim": D}.get(name, 16) for name in names}
        inputs = [x] if op == "linear" else [x, x]
        entry = Entry(op, inputs, Symbol(64), weight=weight, kv=kv, attributes=attributes)
        assert entry_cost(entry, StepShape((2,), (2,), 1)).bytes > 0, op


def test_an_entry_has_the_attributes_that_its_op_declares_and_no_other() -> None:
    for attributes in ({}, {"cap": 1.0, "group": 0}, {"group": 0}):
        with pytest.raises(AssertionError, match="softcap has the attributes"):
            Entry("softcap", [Symbol(4)], Symbol(4), attributes=attributes)


def test_an_op_on_single_numbers_is_written_down_in_seven_files() -> None:
    """What somebody touches who adds one: CONTRIBUTING.md names the same files."""
    root = Path(__file__).parents[2]
    files = [*(root / "src/pellucid").rglob("*.py"), *(root / "csrc").rglob("*.*")]
    naming = {
        str(file.relative_to(root))
        for file in files
        if re.search(r"\bsilu_mul\b", file.read_text())
    }
    naming -= {"src/pellucid/models/blocks.py", "csrc/tests/compare_kernels.cpp"}
    naming -= {"src/pellucid/quant/tape.py"}  # its gradient, for formats chosen by damage
    assert naming == {
        "csrc/kernels/elementwise.inc",
        "csrc/ops.inc",
        "src/pellucid/backends/native/capture.py",
        "src/pellucid/backends/reference/ops.py",
        "src/pellucid/ops/case_lists.py",
        "src/pellucid/ops/cost.py",
        "src/pellucid/ops/protocol.py",
    }


def test_a_program_captured_from_declarations_costs_what_the_loaded_one_costs(tiny: Path) -> None:
    backend = NativeBackend(threads=1)
    with open_checkpoint(tiny) as checkpoint:
        config, specs = checkpoint.config, checkpoint.specs()
        loaded = {name: backend.load_weight(t, name) for name, t in checkpoint.parameters()}
    graph = get_graph(config.graph)

    def entries_of(weights: Mapping[str, Any], caches: Sequence[KVLayer]) -> list[Entry]:
        return capture(
            lambda ops, batch: graph.forward(ops, config, weights, batch, caches)
        ).entries

    stores = [KVLayer(backend.new_kv_store(1, 16, SPEC)) for _ in range(LAYERS)]
    found = [entries_of(loaded, stores), entries_of(specs, [KVLayer(SPEC)] * LAYERS)]
    step = StepShape((5, 1), (5, 60), 2)
    assert [entry.op for entry in found[0]] == [entry.op for entry in found[1]]
    for one, other in zip(*found, strict=True):
        assert entry_cost(one, step) == entry_cost(other, step)


def test_the_roofline_takes_the_slower_of_memory_and_arithmetic() -> None:
    bandwidth = {100: Range.of([40.0, 50.0, 45.0]), 1000: Range.of([10.0])}
    ceilings = Ceilings("none", "measured", bandwidth, {"int8": 800.0, "float32": 200.0})
    assert bandwidth[100] == Range(40.0, 45.0, 50.0, 3)
    assert [ceilings.bandwidth_at(n) for n in (1, 100, 101, 9999)] == [50.0, 50.0, 10.0, 10.0]
    assert ceilings.least_seconds(OpCost(400, 60, 40), 50) == 2.0 and not ceilings.is_memory_bound(
        OpCost(400, 60, 40), 50
    )
    assert ceilings.least_seconds(OpCost(400, 60, 40), 500) == 10.0 and ceilings.is_memory_bound(
        OpCost(400, 60, 40), 500
    )
    # two seconds of each kind
    assert ceilings.least_seconds(OpCost(2000, 60, 40, int8_flops=1600), 50) == 4.0
    # and half a second of scales, which the plain peak leaves out
    scaled = OpCost(2000, 60, 40, int8_flops=1600, scale_flops=100)
    assert ceilings.least_seconds(scaled, 50) == 4.5
    assert ceilings.least_seconds(scaled, 50, scales=False) == 4.0


def test_the_ceilings_of_every_set_of_kernels_are_measured() -> None:
    for isa in ("portable", NativeBackend(threads=1).isa):
        found = measure_ceilings(isa, 1, working_sets=[1 << 22, 1 << 20], seconds=0.02)
        assert list(found.read_bandwidth) == [1 << 20, 1 << 22]
        assert all(
            1e8 < rate < 1e13
            for rate in (
                *(range.least for range in found.read_bandwidth.values()),
                found.int8_peak,
                found.float_peak,
            )
        )
