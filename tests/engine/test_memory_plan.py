"""The memory plan: what an engine takes is known, and refused, before anything is loaded."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, RequestOutput, SamplingParams
from pellucid.batch import ForwardBatch
from pellucid.config import ModelConfig
from pellucid.engine import memory
from pellucid.engine.admission import Submission
from pellucid.engine.loader import build_engine, open_model
from pellucid.engine.memory import check_fits, engine_bytes, plan_kv_cache
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.engine_config import EngineConfig
from pellucid.errors import CapacityError, ConfigError
from pellucid.kv.layout import build_layout
from pellucid.kv_spec import build_kv_specs
from pellucid.ops.backend import Logits

from .conftest import write_tiny

pytestmark = pytest.mark.slow  # the reference backend computes wide models

WIDE = 200_000  # of the MLP: 512 tokens of it take more than 800 MB
ROOM = 700 << 20
MODEL = ModelConfig(
    architecture="llama",
    graph="llama",
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=32,
    max_position_embeddings=64,
)
LAYOUT = build_layout(build_kv_specs(MODEL, "f32", "f32"), [256, 256], 16)
BLOCK = 2 * 256 * 16

# A process with so much address space left once the package is there; what became of the model.
PROBE = """
import json, resource, sys
from pathlib import Path
from pellucid import LLM, SamplingParams
from pellucid.errors import CapacityError, ConfigError
import pellucid.engine.llm, pellucid.backends.native.backend
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[2]),) * 2)
try:
    llm = LLM(sys.argv[1], **json.loads(sys.argv[3]))
    print(len(llm.generate("a" * 20, SamplingParams(max_tokens=2))[0].outputs[0].token_ids))
except CapacityError as error:
    print(error)
"""


def _run_within(path: Path, num_bytes: int, **options: object) -> str:
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(path), str(num_bytes), json.dumps(options)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space is Linux's")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_activations_that_do_not_fit_are_refused_with_the_option_that_shrinks_them(
    tmp_path: Path, backend: str
) -> None:
    path = write_tiny(tmp_path / "wide.gguf", ffn=WIDE, windows=(0,))
    options = {"backend": backend, "kv_cache_memory": 1 << 20}
    said = _run_within(path, ROOM, **options)
    assert "the largest parts: activations" in said and "weights" in said
    assert "max_num_batched_tokens, which is 512" in said
    # in smaller steps it fits and runs within the same limit
    assert _run_within(path, ROOM, max_num_batched_tokens=16, **options).isdigit()


def test_the_three_largest_parts_are_named() -> None:
    items = {"weights": 5_000, "activations": 70_000, "logits": 6_000, "sampling": 1_000}
    check_fits(EngineConfig(), items, 82_000)
    with pytest.raises(
        CapacityError,
        match=r"needs 82.0 kB of memory .* and 82.0 kB are available; the largest parts: "
        r"activations 70.0 kB, logits 6.0 kB, weights 5.0 kB",
    ):
        check_fits(EngineConfig(), items, 81_999)


def test_weights_a_step_and_the_sampler_are_counted(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = engine_bytes(MODEL, EngineConfig(), 4, 10, {"activations": 20})
    assert items == {"weights": 10, "activations": 20, "sampling": 4 * 1000 * 20}
    monkeypatch.setattr("pellucid.engine.memory.lies_in_memory", lambda _: True)
    swapping = EngineConfig(preemption="swap", swap_space=77 / (1 << 30))
    assert 77 in engine_bytes(MODEL, swapping, 4, 10, {}).values()


def test_the_kv_cache_takes_a_quarter_of_what_is_free_or_the_share_that_is_asked_for() -> None:
    free = BLOCK * 41
    assert plan_kv_cache(MODEL, EngineConfig(), LAYOUT, 256, free) == (64, 10)
    assert plan_kv_cache(MODEL, EngineConfig(), LAYOUT, 2, free) == (64, 8)  # all that two need
    half = EngineConfig(kv_cache_memory=0.5)
    assert plan_kv_cache(MODEL, half, LAYOUT, 256, free) == (64, 20)


def test_the_block_that_tables_are_padded_with_is_counted() -> None:
    config = EngineConfig(kv_cache_memory=10 * BLOCK)
    assert plan_kv_cache(MODEL, config, LAYOUT, 256, 11 * BLOCK) == (64, 10)
    with pytest.raises(CapacityError, match=r"at most 81.9 kB are available"):
        plan_kv_cache(MODEL, config, LAYOUT, 256, 11 * BLOCK - 1)


def test_nothing_left_for_the_kv_cache_is_refused() -> None:
    with pytest.raises(CapacityError, match="holds no request"):
        plan_kv_cache(MODEL, EngineConfig(), LAYOUT, 256, 0)


def test_a_second_engine_counts_the_weights_that_it_shares_as_nothing(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = []

    def count(model: ModelConfig, config: EngineConfig, seqs: int, weights: int, step: Any) -> Any:
        counted.append(weights)
        return engine_bytes(model, config, seqs, weights, step)

    monkeypatch.setattr("pellucid.engine.loader.engine_bytes", count)
    with open_model(tiny_path) as model:
        for backend in ("native", "native", "reference"):
            model.build_engine(EngineConfig(backend=backend))
    assert counted[0] > 0 and counted[1] == 0 and counted[2] > 0


def test_logits_are_planned_for_the_rows_that_a_step_can_have(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scored prompts are computed in pieces that have no more rows, and get the same logprobs."""
    params = [
        SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=n, logprobs=1)
        for n in (2, 0, None, 1)
    ]
    prompts = [[*b"which prompt tokens are scored"] * n for n in (1, 2, 2, 1)]
    with LLM(tiny_path) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
    monkeypatch.setattr(memory, "SCORED_BYTES", 0)
    monkeypatch.setattr(memory, "MIN_SCORED", 5)
    config = EngineConfig(max_num_seqs=3)
    engine = build_engine(tiny_path, config)
    assert memory.count_logits(engine.model_config, config, 3) == 8
    runner, rows = engine.core.runner, []
    forward = runner.forward

    def counted(batch: ForwardBatch) -> Logits:
        rows.append(len(batch.logits_indices))
        return forward(batch)

    runner.forward = counted
    for i, (prompt, chosen) in enumerate(zip(prompts, params, strict=True)):
        engine.core.add_requests([Submission(str(i), TokenizedPrompt(prompt, None), chosen)])
    answers: dict[str, RequestOutput] = {}
    while engine.core.has_unfinished:
        answers |= {output.request_id: output for output in engine.core.step()}
        engine.core.scheduler.check_integrity()
    assert 5 <= max(rows) <= 8
    for i, output in enumerate(expected):
        assert answers[str(i)].prompt_logprobs == output.prompt_logprobs
        assert answers[str(i)].outputs == output.outputs


def test_a_large_vocabulary_has_few_rows_of_logits() -> None:
    assert memory.count_scored(262_144) == 64
    assert memory.count_scored(32_000) > 512


def test_a_model_for_one_token_is_refused_for_that(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="made for at most 1 token"):
        LLM(write_tiny(tmp_path / "one.gguf", context=1))
