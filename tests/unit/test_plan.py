"""`pellucid plan`: the arithmetic of the KV cache and of the weights, what fits, and the speed that
the roofline allows, all from headers.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.costs import StepShape
from pellucid.cli.main import main
from pellucid.errors import ConfigError
from pellucid.measure.hardware import DATA_SHEETS
from pellucid.measure.headers import Headers, find_headers, read_headers
from pellucid.measure.plan import MemoryPlan, build_memory_plan, predict
from pellucid.measure.roofline import total

LLAMA_3_8B: Mapping[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
DEEPSEEK_V3: Mapping[str, object] = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "n_routed_experts": 256,
}
H100 = DATA_SHEETS["h100"]
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """A config.json alone, of Llama 3 8B with other values where they are given."""

    def write(base: Mapping[str, object] = LLAMA_3_8B, **changes: object) -> Path:
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**base, **changes}))
        return path

    return write


@pytest.fixture(scope="module")
def backend() -> NativeBackend:
    return NativeBackend(threads=2)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)])


def headers_of(path: Path) -> Headers:
    return read_headers(path)


def test_the_roadmaps_example_llama_3_8b(write: Write) -> None:
    command = (write(), "--kv-dtype", "bf16", "--ctx", 4096, "--hardware", "h100")
    shown = run(*command).output
    assert (
        "GQA, 4 query heads share a KV head: 2 (key and value) · 32 layers · 8 KV heads · 128 "
        "numbers · 2 bytes (bf16) = 131,072 bytes per token" in shown
    )
    assert "536,870,912 bytes (512 MiB) per request" in shown
    report = json.loads(run(*command, "--json").output.splitlines()[-1])
    assert report["kv_bytes_per_token"] == 131_072
    assert report["kv_bytes_per_request"] == 512 << 20
    assert sum(group["parameters"] for group in report["weights"].values()) == 8_030_261_248
    assert report["weight_bytes"] == 2 * 8_030_261_248


@pytest.mark.parametrize(
    "changes, kv_dtype, kind, per_token",
    [
        ({"num_key_value_heads": 32}, "f16", "MHA", 32 * 2 * 32 * 128 * 2),
        ({"num_key_value_heads": 1}, "f16", "MQA, 32 query heads", 32 * 2 * 128 * 2),
        ({}, "f32", "GQA", 32 * 2 * 8 * 128 * 4),
        ({}, "int8", "with scales", 32 * 2 * 8 * 130),
        ({}, "int8,int4", "int8, int4, with scales", 32 * 8 * (130 + 72)),
    ],
)
def test_bytes_per_token(
    write: Write,
    backend: NativeBackend,
    changes: Mapping[str, object],
    kv_dtype: str,
    kind: str,
    per_token: int,
) -> None:
    plan = build_memory_plan(
        headers_of(write(**changes)), backend, kv_dtype=kv_dtype, hardware=H100
    )
    assert plan.program.layout.bytes_per_token == per_token
    (formula,) = plan.formula
    assert kind in formula and f"= {per_token:,} bytes per token" in formula


def test_a_window_bounds_what_a_layer_keeps(write: Write, backend: NativeBackend) -> None:
    path = write(model_type="mistral", sliding_window=1024)
    plan = build_memory_plan(headers_of(path), backend, ctx=8192, hardware=H100)
    assert plan.program.kv_bytes(8192) == 1024 * 131_072 == plan.program.kv_bytes(1024)
    assert "for the last 1,024 tokens at most" in plan.formula[0]
    assert plan.kv_bytes < 8192 * 131_072


def test_the_latent_cache_of_deepseek(write: Write) -> None:
    found = run(write(DEEPSEEK_V3), "--ctx", 4096)
    assert found.exit_code == 0, found.output
    assert (
        "61 layers · (512 numbers of the latent + 64 of the rotary key) · 2 bytes" in found.output
    )
    assert "= 70,272 bytes per token" in found.output and "does not run deepseek_v3" in found.output
    shared = run(write(DEEPSEEK_V3), "--ctx", 4096, "--batch", 2, "--hardware", "h200", "--tp", 8)
    assert "2 of them: 576 MB" in shared.output
    assert "Each of 8 devices keeps all of it: a latent has no heads to divide." in shared.output
    report = json.loads(run(write(DEEPSEEK_V3), "--json").output)
    assert report["kv_bytes_per_token"] == 61 * 576 * 2 and report["runs"] is False


def test_what_fits_is_the_most_that_fits(write: Write, backend: NativeBackend) -> None:
    def plan(ctx: int, batch: int = 1) -> MemoryPlan:
        device = DATA_SHEETS["rtx4090"]
        return build_memory_plan(headers, backend, ctx=ctx, batch=batch, hardware=device)

    headers = headers_of(write(max_position_embeddings=1 << 20))
    found = plan(ctx=4096)
    assert found.fits
    batch = found.largest_batch
    assert plan(ctx=4096, batch=batch).fits and not plan(ctx=4096, batch=batch + 1).fits
    longest = found.largest_ctx
    assert plan(ctx=longest).fits and not plan(ctx=longest + 16).fits


def test_tensor_parallelism_divides_heads_mlp_and_vocabulary(
    write: Write, backend: NativeBackend
) -> None:
    headers = headers_of(write())
    one, four, sixteen = (
        build_memory_plan(headers, backend, hardware=H100, tp=tp) for tp in (1, 4, 16)
    )
    norms = next(g.num_bytes for g in one.weights if g.name == "norms")
    assert 4 * (four.weight_bytes - norms) == one.weight_bytes - norms
    assert 4 * four.program.layout.bytes_per_token == one.program.layout.bytes_per_token
    # more devices than KV heads: each device has a copy of one
    assert 8 * sixteen.program.layout.bytes_per_token == one.program.layout.bytes_per_token
    speeds = predict(four, H100, None)
    assert speeds["prefill"].parts["link"] > 0
    assert speeds["decode"].seconds < predict(one, H100, None)["decode"].seconds


def test_the_roofline_says_what_binds(write: Write, backend: NativeBackend) -> None:
    plan = build_memory_plan(headers_of(write()), backend, ctx=4096, hardware=H100)
    speeds = predict(plan, H100, None)
    assert speeds["prefill"].bound == "arithmetic"
    decode = speeds["decode"]
    assert decode.bound == "memory"
    # the embedding is looked up, and lm_head is read whole
    assert decode.weight_bytes == pytest.approx(plan.weight_bytes - 2 * 128256 * 4096, rel=1e-3)
    least = (decode.weight_bytes + decode.kv_bytes) / 3350e9
    assert least < decode.seconds < 1.05 * least


def test_the_flops_of_a_step_are_two_for_each_weight_and_token(
    write: Write, backend: NativeBackend
) -> None:
    plan = build_memory_plan(headers_of(write()), backend, hardware=H100)
    step = StepShape((7,), (7,), 7)
    linear = [
        cost
        for item, cost in zip(plan.program.items, plan.program.costs(step), strict=True)
        if item.entry.op == "linear"
    ]
    matrices = sum(
        spec.shape[0] * spec.shape[1]
        for name, spec in plan.headers.specs.items()
        if len(spec.shape) == 2 and name != "embed_tokens.weight"
    )
    assert total(linear).flops == 2 * 7 * matrices


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--hardware", "h1000"], "hardware 'h1000' is unknown"),
        (["--hardware", "rtx4071"], "did you mean 'rtx4070'?"),
        (["--tp", 2], "name --hardware"),
        (["--tp", 3, "--hardware", "h100"], "num_heads is 32, which it does not divide"),
        (["--ctx", 9000, "--hardware", "h100"], "ctx is 9000; it must be between 2 and 8192"),
        (["--kv-dtype", "int3", "--hardware", "h100"], "kv_dtype is 'int3'"),
        (["--hardware", "rtx4070"], "do not fit"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_sentence(
    write: Write, arguments: list[object], sentence: str
) -> None:
    found = CliRunner().invoke(main, ["plan", str(write()), *map(str, arguments)])
    assert found.exit_code == 1
    last = found.output.strip().splitlines()[-1]
    assert last.startswith("pellucid: error: ") and sentence in last


def test_a_model_that_does_not_fit_is_planned_all_the_same(write: Write) -> None:
    found = run(write(), "--hardware", "rtx4070", "--json")
    report = json.loads(found.output)
    assert found.exit_code == 1 and report["fits"] is False and report["largest_batch"] == 0


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model_type": "mamba"}, "model_type is 'mamba'; known ones are"),
        ({"torch_dtype": "int3"}, "torch_dtype is 'int3'"),
        ({"hidden_size": -1}, "hidden size -1 is not a multiple"),
    ],
)
def test_a_config_that_cannot_be_read_is_told_in_one_sentence(
    write: Write, changes: Mapping[str, object], sentence: str
) -> None:
    found = run(write(**changes), "--hardware", "h100")
    assert found.exit_code == 1 and sentence in found.output
    assert len(found.output.strip().splitlines()) == 1


def test_a_plan_says_what_it_assumes_of_the_weights(write: Write) -> None:
    command = ("--hardware", "h100", "--ctx", 128)
    assert "planned as BF16, as its torch_dtype says" in run(write(), *command).output
    without = {k: v for k, v in LLAMA_3_8B.items() if k != "torch_dtype"}
    shown = run(write(without), *command).output
    assert "planned as BF16, as its config.json has no torch_dtype" in shown


def test_a_folder_with_a_config_alone_is_planned(write: Write) -> None:
    assert run(write().parent, "--hardware", "h100").exit_code == 0


def test_a_wrong_size_of_the_latent_is_refused(write: Write) -> None:
    found = run(write(DEEPSEEK_V3, qk_rope_head_dim=0))
    assert found.exit_code == 1 and "qk_rope_head_dim is '0'" in found.output


def test_a_context_beyond_the_model_is_refused(write: Write, backend: NativeBackend) -> None:
    with pytest.raises(ConfigError, match="ctx is 1; it must be between 2 and 8192"):
        build_memory_plan(headers_of(write()), backend, ctx=1, hardware=H100)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("/dev/null", "is neither a file nor a folder"),
        ("~no_such_user/model", "no file or folder"),
        ("x" * 5000, "no file or folder"),
    ],
)
def test_what_is_no_model_is_told_as_elsewhere(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        find_headers(name)
