"""A draft model: whatever it guesses, each answer is that of the plain run, bit for bit. What is
accepted shows that it has computed the right tokens.

The drafts of these tests are the model itself, whose guesses are all right, and its first layer
alone, whose guesses are right now and then.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, EngineConfig, SamplingParams
from pellucid.backends.native.backend import NativeBackend
from pellucid.config import ModelConfig
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.draft import check_vocabulary
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.errors import CapacityError, ConfigError, UnsupportedError
from pellucid.request import Request
from pellucid.speculative import Speculation
from pellucid.speculative.governor import VerifyAll
from pellucid.speculative.speculation import MAX_DRAFT_TOKENS

from .conftest import write_tiny
from .drafting import ListProposer
from .test_drafts import MAX_MODEL_LEN, draw_config, draw_submissions, run

GROUPS, RUNS = 8, 15  # each group is a test


@pytest.fixture(scope="module")
def drafts(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Draft models of the tiny model, by what they are."""
    folder = tmp_path_factory.mktemp("drafts")
    return {
        "itself": tiny_path,
        "one layer": write_tiny(folder / "one.gguf", windows=(0,)),
        "padded": write_tiny(folder / "padded.gguf", windows=(0,), padding=7),
        "wide heads": write_tiny(folder / "wide.gguf", windows=(0,), head_dim=16),
    }


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[OpenModel]:
    with open_model(tiny_path) as opened:
        yield opened


def build_core(
    model: OpenModel, draft: Path | None, num_tokens: int = 8, **options: Any
) -> EngineCore:
    """An engine that verifies all drafts."""
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        backend_options={"threads": 1},
        speculative=None if draft is None else f"draft:{draft}",
        kv_cache_memory=1 << 21,
    )
    core = model.build_engine(replace(config, **options)).core
    if draft is not None:
        verify_all(model, core, num_tokens)
    return core


def verify_all(model: OpenModel, core: EngineCore, num_tokens: int = 8) -> None:
    assert core.speculation is not None
    core.speculation = Speculation(
        [p for p in core.speculation.proposers if p.name == "draft"],
        model.model_config.vocab_size,
        num_speculative_tokens=num_tokens,
        governor=VerifyAll(),
    )


def submit(*prompts: str, name: str = "r", **params: Any) -> list[Submission]:
    shape = SamplingParams(**{"temperature": 0.0, "ignore_eos": True, "max_tokens": 20, **params})
    return [
        Submission(f"{name}{i}", TokenizedPrompt([*prompt.encode()], None), shape)
        for i, prompt in enumerate(prompts)
    ]


def accepted(core: EngineCore) -> tuple[int, int]:
    stats = core.stats()
    return stats.num_accepted_tokens, stats.num_draft_tokens


@pytest.mark.parametrize("kind", ["itself", "one layer", "padded", "wide heads"])
@pytest.mark.parametrize(
    "group", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, GROUPS))]
)
def test_no_answer_changes(
    model: OpenModel, drafts: dict[str, Path], kind: str, group: int
) -> None:
    right = made = cached = 0
    for seed in range(group * RUNS, (group + 1) * RUNS):
        rng = random.Random(seed)
        submissions = draw_submissions(rng)
        expected = run(build_core(model, None, enable_prefix_caching=False), submissions, rng)
        config = replace(draw_config(rng, model), speculative=f"draft:{drafts[kind]}")
        layout = model.layout(config)
        blocks = layout.blocks_for(MAX_MODEL_LEN, config.max_num_batched_tokens)
        most = rng.choice((blocks, blocks + 2, 10 * blocks))
        config = replace(config, kv_cache_memory=layout.bytes_per_block * most)
        core = model.build_engine(config).core
        verify_all(model, core)
        found = run(core, submissions, rng)
        for name, output in expected.items():
            assert found[name].outputs == output.outputs, f"seed {seed}"
            assert found[name].prompt_logprobs == output.prompt_logprobs, f"seed {seed}"
        assert core.speculation is not None and core.speculation.proposers, f"seed {seed}"
        right, made = right + accepted(core)[0], made + accepted(core)[1]
        cached += core.stats().num_cached_tokens
        if kind == "itself":
            # Only drafts behind the end of an answer are lost, in its last step.
            lost = accepted(core)[1] - accepted(core)[0]
            answers = [answer for output in expected.values() for answer in output.outputs]
            stopped = sum(answer.finish_reason == "stop" for answer in answers)
            assert 0 <= lost <= MAX_DRAFT_TOKENS * stopped, f"seed {seed}"
    assert made > right > 0 or right == made > 100
    assert cached


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "seed": 4, "top_p": 0.9, "top_k": 30, "repetition_penalty": 1.2},
        {"n": 3, "temperature": 1.5, "seed": 5, "logit_bias": {97: 2.0}},
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 16},  # the draft catches up with prompts in chunks
        {"max_num_batched_tokens": 5, "max_num_seqs": 2},
        {"enable_prefix_caching": False},
        {"max_num_seqs": 1, "block_size": 32},
        {"kv_cache_dtype": "int8"},
    ],
)
def test_every_guess_of_the_model_itself_is_right(
    model: OpenModel, tiny_path: Path, params: dict[str, Any], options: dict[str, Any]
) -> None:
    prompts = submit("abcabcabcabcabcabcab", "the quick brown fox", "a" * 40, **params)
    core = build_core(model, tiny_path, **options)
    found = run(core, prompts, random.Random(0))
    dtype = {n: v for n, v in options.items() if n == "kv_cache_dtype"}
    expected = run(build_core(model, None, **dtype), prompts, random.Random(0))
    assert {n: o.outputs for n, o in found.items()} == {n: o.outputs for n, o in expected.items()}
    right, made = accepted(core)
    assert right == made > 20


def test_no_draft_wins_by_tokens_behind_the_end_of_the_answer(
    model: OpenModel, tiny_path: Path
) -> None:
    prompts = submit("abcabcabcabcabcabcab", "the quick brown fox", max_tokens=13)
    expected = run(build_core(model, None), prompts, random.Random(0))

    def guess_wrong(requests: Sequence[Request]) -> dict[str, list[int]]:
        """As many tokens as are allowed, of which the first is wrong."""
        return {
            r.request_id: [answer(r)[len(r.output_token_ids)] ^ 1] * 8
            for r in requests
            if len(r.output_token_ids) >= 9  # the draft model's are shorter from here on
        }

    def answer(request: Request) -> Sequence[int]:
        return expected[request.request_id].outputs[0].token_ids

    core = build_core(model, tiny_path)
    assert core.speculation is not None
    core.speculation = Speculation(
        [*core.speculation.proposers, ListProposer(guess_wrong)],
        model.model_config.vocab_size,
        num_speculative_tokens=8,
        governor=VerifyAll(),
    )
    found = run(core, prompts, random.Random(0))
    assert {n: o.outputs for n, o in found.items()} == {n: o.outputs for n, o in expected.items()}
    right, made = accepted(core)
    assert right == made == 20


def test_a_draft_model_that_cannot_say_what_it_missed_is_dropped(
    model: OpenModel, tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = submit("abcabcabc")
    expected = run(build_core(model, None), prompts, random.Random(0))
    core = build_core(model, tiny_path)
    assert core.speculation is not None
    [proposer] = core.speculation.proposers
    proposer.num_missed = lambda request: 1 // 0  # type: ignore[attr-defined]
    found = run(core, prompts, random.Random(0))
    assert {n: o.outputs for n, o in found.items()} == {n: o.outputs for n, o in expected.items()}
    assert core.speculation.proposers == []
    (told,) = caplog.messages
    assert "because it is wrong: it raised ZeroDivisionError" in told


def steps(core: EngineCore, submissions: Sequence[Submission]) -> int:
    core.add_requests(submissions)
    count = 0
    for _ in range(1000):
        if not core.has_unfinished:
            break
        core.step()
        core.scheduler.check_integrity()
        count += 1
    return count


def test_a_prefix_that_was_computed_without_the_draft_is_caught_up(
    model: OpenModel, tiny_path: Path
) -> None:
    """A request hits blocks in which the draft has computed nothing. Its guesses are right all the
    same, and a third request need not compute them again.
    """
    core = build_core(model, tiny_path)
    speculation, core.speculation = core.speculation, None
    steps(core, submit("abcabcabcabcabcabcabcabcabcabcab", max_tokens=2, name="plain"))
    core.speculation = speculation
    for name in ("second", "third"):
        before = accepted(core)
        steps(core, submit("abcabcabcabcabcabcabcabcabcabcabcd", name=name))
        right, made = (a - b for a, b in zip(accepted(core), before, strict=True))
        assert right == made > 10
    assert core.stats().num_cached_tokens >= 64


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_a_preempted_request_is_drafted_on(
    model: OpenModel, tiny_path: Path, preemption: str
) -> None:
    options: dict[str, Any] = {"max_num_seqs": 4, "preemption": preemption, "swap_space": 0.01}
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN, speculative=f"draft:{tiny_path}", swap_space=0.01
    )
    layout = model.layout(config)
    core = build_core(model, tiny_path, kv_cache_memory=layout.bytes_per_block * 6, **options)
    prompts = submit("abcabcabcabcabc", "the quick brown", "xyxyxyxyxyxyxyx", max_tokens=40)
    found = run(core, prompts, random.Random(0))
    expected = run(build_core(model, None), prompts, random.Random(0))
    assert {n: o.outputs for n, o in found.items()} == {n: o.outputs for n, o in expected.items()}
    assert core.stats().num_preemptions > 0
    if preemption == "swap":
        assert core.stats().num_loaded_blocks > 0
    right, made = accepted(core)
    assert right == made > 20


def test_an_aborted_request_leaves_nothing(model: OpenModel, drafts: dict[str, Path]) -> None:
    core = build_core(model, drafts["one layer"])
    for i in range(12):
        core.add_requests(submit("abcabcabc", name=f"{i}-", temperature=1.0, seed=i))
        for _ in range(1 + i % 5):
            core.step()
        core.abort(f"{i}-0")
        core.scheduler.check_integrity()
    kv = core.scheduler.kv
    assert not core.has_unfinished and kv.num_available_blocks == kv.num_blocks
    assert accepted(core)[1] > 0


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"ffn": 64}, "has 26,944 parameters and the model 23,872; a draft must not be larger"),
        (
            {"windows": (0,), "merge": "he"},
            "has another vocabulary: token 260 is 'he' there and 'th' in the model",
        ),
    ],
)
def test_a_model_that_cannot_draft_is_refused(
    tiny_path: Path, tmp_path: Path, shape: dict[str, Any], message: str
) -> None:
    draft = write_tiny(tmp_path / "draft.gguf", **shape)
    with pytest.raises(ConfigError, match=f"the draft model {draft} {message}"):
        LLM(tiny_path, speculative=f"draft:{draft}")


def test_a_draft_that_the_backend_cannot_compute_is_refused(
    model: OpenModel, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_: NativeBackend, config: ModelConfig) -> None:
        if config.num_layers == 1:
            raise UnsupportedError("head_dim is 8; the native backend computes at most 4")

    monkeypatch.setattr(NativeBackend, "check_model", check)
    with pytest.raises(UnsupportedError, match="the draft model: head_dim is 8; "):
        build_core(model, drafts["one layer"])


def test_the_memory_plan_counts_the_draft_model(
    tiny_path: Path, drafts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig(speculative=f"draft:{drafts['one layer']}")
    with open_model(tiny_path) as model:
        plain, both = model.layout(EngineConfig()), model.layout(config)
        assert 2 * both.bytes_per_block == 3 * plain.bytes_per_block
        model.build_engine(EngineConfig())  # its own weights are there already
        monkeypatch.setattr(NativeBackend, "weight_bytes", lambda *_: 1 << 45)
        monkeypatch.setattr(NativeBackend, "step_bytes", lambda *_: {"activations": 1 << 46})
        with pytest.raises(CapacityError) as refused:
            model.build_engine(config)
    for part in ("weights of the draft model", "activations 70.4 TB", "activations of the draft"):
        assert part in str(refused.value)


@pytest.mark.parametrize("context", [24, 40])
def test_no_token_is_drafted_behind_the_drafts_context(
    model: OpenModel, tmp_path: Path, context: int
) -> None:
    draft = write_tiny(tmp_path / "short.gguf", windows=(0,), context=context)
    prompts = submit("abcabcabcabcabcabcabc", max_tokens=30)
    core = build_core(model, draft)
    found = run(core, prompts, random.Random(0))
    expected = run(build_core(model, None), prompts, random.Random(0))
    assert found["r0"].outputs == expected["r0"].outputs
    assert core.stats().num_draft_tokens > 0


def test_the_vocabularies_are_compared_by_the_bytes_of_tokens(
    model: OpenModel, drafts: dict[str, Path]
) -> None:
    """Rows that pad the embedding stand for nothing, and may differ in number and name."""
    with open_model(drafts["padded"]) as padded:
        assert padded.tokenizer.vocab_size > model.tokenizer.vocab_size
        check_vocabulary("x", padded.tokenizer, model.tokenizer)
        check_vocabulary("x", model.tokenizer, padded.tokenizer)


@pytest.mark.parametrize("kind", ["itself", "one layer"])
def test_what_the_governor_chooses_changes_no_answer(
    model: OpenModel, drafts: dict[str, Path], kind: str
) -> None:
    """Lookups and the draft model are asked by what this machine's steps take."""
    prompts = submit("abcabcabcabcabcabcab", "the quick brown fox", max_tokens=40, n=2, seed=1)
    config = EngineConfig(
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=3,
        backend_options={"threads": 1},
        speculative=f"draft:{drafts[kind]}",
    )
    core = model.build_engine(config).core
    assert core.speculation is not None
    assert [p.name for p in core.speculation.proposers] == ["suffix", "draft"]
    expected = run(build_core(model, None), prompts, random.Random(0))
    for _ in range(2):
        found = run(core, prompts, random.Random(0))
        assert {n: o.outputs for n, o in found.items()} == {
            n: o.outputs for n, o in expected.items()
        }
    assert len(core.speculation.proposers) == 2
