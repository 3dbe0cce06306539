"""Speculation as its users see it: the same answers, and a receipt of what it did."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pellucid import LLM, RequestOutput, SamplingParams
from pellucid.cli.main import main
from pellucid.errors import ConfigError
from pellucid.speculative.governor import Governor, VerifyAll

METHODS = ("ngram", "suffix", "auto")
# A text that repeats itself, one that does not, and one that is cut in the middle of a repetition.
PROMPTS = ["abcabcabcabcab", "the quick brown fox", "one two three one two thr", "aaaa", "xyxyx"]
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=40, logprobs=2, ignore_eos=True),
    "sampled": SamplingParams(temperature=0.9, top_p=0.9, seed=3, max_tokens=40, logprobs=1, n=2),
    "penalties": SamplingParams(
        temperature=0.6, seed=5, max_tokens=40, repetition_penalty=1.05, presence_penalty=0.1,
        frequency_penalty=-0.3, min_tokens=20, logit_bias={97: 2.0}, bad_words=["zz"],
    ),
    "stops": SamplingParams(
        temperature=1.2, seed=7, max_tokens=40, logit_bias={97: 5.0, 98: 5.0},
        stop=["abba", "bbb"], min_tokens=5,
    ),
}  # fmt: skip


def answers(path: Path, params: SamplingParams, **options: Any) -> list[RequestOutput]:
    with LLM(path, max_model_len=96, threads=1, **options) as llm:
        return llm.generate(PROMPTS * 2, params, use_tqdm=False)


def shown(outputs: list[RequestOutput]) -> list[Any]:
    return [output.outputs for output in outputs]


@pytest.fixture
def verify_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draft is verified: on so small a model the governor would turn most of them down."""
    for name in vars(VerifyAll):
        if not name.startswith("_"):
            monkeypatch.setattr(Governor, name, getattr(VerifyAll, name))


@pytest.mark.usefixtures("verify_all")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", PARAMS)
def test_no_answer_changes(tiny_path: Path, method: str, kind: str) -> None:
    plain = shown(answers(tiny_path, PARAMS[kind]))
    num_drafted = 0
    kv = {"kv_cache_dtype": "f16"} if kind == "greedy" else {}
    for options in (
        {"max_num_seqs": 1},
        {"max_num_seqs": 16},
        {"max_num_seqs": 4, "max_num_batched_tokens": 16},
        {"max_num_seqs": 4, "preemption": "swap", "enable_prefix_caching": True},
        {"num_speculative_tokens": 1},
        {"kv_cache_memory": 1 << 15, "preemption": "recompute"},
    ):
        found = answers(tiny_path, PARAMS[kind], speculative=method, **options)
        assert shown(found) == plain
        num_drafted += sum(o.speculation.num_draft_tokens for o in found if o.speculation)
    assert num_drafted > 0  # or nothing was shown
    if kv:
        found = answers(tiny_path, PARAMS[kind], speculative=method, **kv)
        assert shown(found) == shown(answers(tiny_path, PARAMS[kind], **kv))


@pytest.mark.usefixtures("verify_all")
@pytest.mark.parametrize("end", [{}, {"stop": ["bab"]}])
def test_the_receipt_adds_up(tiny_path: Path, end: dict[str, Any]) -> None:
    """One at a time, so that the engine's seconds are those of its requests. Draft tokens behind
    the end of an answer count as rejected.
    """
    params = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, logit_bias={97: 30.0, 98: 30.0},
        frequency_penalty=2.0, min_tokens=8, **end,
    )  # fmt: skip
    options: dict[str, Any] = {"speculative": "ngram", "num_speculative_tokens": 5}
    with LLM(tiny_path, max_model_len=96, max_num_seqs=1, **options) as llm:
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        total = llm.stats().speculation
    assert total is not None
    receipts = [output.speculation for output in outputs]
    for output, receipt in zip(outputs, receipts, strict=True):
        assert receipt is not None
        drafted, accepted = (
            receipt.num_draft_tokens_per_position,
            receipt.num_accepted_tokens_per_position,
        )
        assert len(drafted) == len(accepted) <= 5
        assert all(d >= a for d, a in zip(drafted, accepted, strict=True))
        # prefill gives the first token, each later step one and its accepted drafts
        num_tokens = len(output.outputs[0].token_ids)
        assert num_tokens - 1 == receipt.num_steps + sum(accepted)
        assert receipt.num_drafts <= receipt.num_steps and receipt.reason.startswith("o")
        assert receipt.tokens_per_step == 1 + sum(accepted) / receipt.num_steps
    for name in ("num_steps", "num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert getattr(total, name) == sum(getattr(receipt, name) for receipt in receipts)
    assert total.seconds_saved == pytest.approx(sum(r.seconds_saved for r in receipts if r))


def test_without_speculation_there_is_no_receipt(tiny_path: Path) -> None:
    with LLM(tiny_path, max_model_len=64, speculative=None) as llm:
        [output] = llm.generate("ab", SamplingParams(max_tokens=2), use_tqdm=False)
        assert output.speculation is None and llm.stats().speculation is None
        assert llm.stats().num_draft_tokens == 0


@pytest.mark.parametrize(
    "options", [{"speculative": None}, {"speculative": "none"}, {"speculative_config": None}]
)
def test_auto_is_the_default_and_can_be_turned_off(
    tiny_path: Path, options: dict[str, Any]
) -> None:
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM(tiny_path, max_model_len=64) as llm:
        assert llm.config.speculative == "auto"
        [output] = llm.generate("abcabcabc", params, use_tqdm=False)
        assert output.speculation is not None and output.speculation.reason
    with LLM(tiny_path, max_model_len=64, **options) as llm:
        [plain] = llm.generate("abcabcabc", params, use_tqdm=False)
        assert plain.outputs == output.outputs and plain.speculation is None


def test_auto_is_off_where_drafts_could_change_an_answer(tiny_path: Path) -> None:
    """The reference backend's sums depend on the number of rows."""
    with LLM(tiny_path, max_model_len=64, backend="reference") as llm:
        [output] = llm.generate("abab", SamplingParams(max_tokens=4), use_tqdm=False)
        assert output.speculation is None
    with LLM(tiny_path, max_model_len=64, backend="reference", speculative="ngram") as llm:
        [output] = llm.generate("abab", SamplingParams(max_tokens=4), use_tqdm=False)
        assert output.speculation is not None


def test_the_command_line_turns_it_off(tiny_path: Path) -> None:
    words = ["run", "abcabc", "--raw", "-m", str(tiny_path), "-n", "5", "--ignore-eos", "--json"]
    assert "speculation" in json.loads(CliRunner().invoke(main, words).stdout)
    told = CliRunner().invoke(main, [*words, "--speculative", "none"])
    assert "speculation" not in json.loads(told.stdout)


def test_a_new_conversation_turn_drafts_from_earlier_answers(tiny_path: Path) -> None:
    """The same question twice: the second answer is drafted from the first."""
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    with LLM(tiny_path, max_model_len=96, speculative="suffix") as llm:
        first, second = (
            llm.generate("the quick brown fox", params, use_tqdm=False)[0] for _ in range(2)
        )
    assert first.outputs == second.outputs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative": "ngrm"}, "ngrm.*ngram"),
        ({"speculative": "medusa"}, "medusa.*auto.*ngram.*suffix"),
        ({"speculative": "auto", "num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"speculative": "auto", "num_speculative_tokens": 1.5}, "num_speculative_tokens is 1.5"),
        ({"speculative": 3}, "speculative is 3"),
        ({"speculative_config": "{"}, "speculative_config is not a JSON object"),
        ({"speculative_config": [1]}, r"speculative_config is \[1\]; it must be a mapping"),
        ({"speculative_config": {}}, "speculative_config has no method and no model"),
        ({"speculative_config": {"method": "draft_model"}}, "the model of speculative_config is N"),
        ({"speculative_config": {"model": 3}}, "the model of speculative_config is 3"),
        ({"speculative_config": {"method": "ngram", "model": "x"}}, "'ngram', which has no model"),
        ({"speculative": "draft:"}, "speculative is 'draft:'; draft: is followed by a model"),
        ({"speculative": "draft:/x.gguf"}, "the draft model: there is no file or folder '/x.gguf'"),
        ({"speculative_config": {"model": "/x.gguf"}}, "the draft model: there is no .*'/x.gguf'"),
        (
            {"speculative": "auto", "num_speculative_tokens": 8, "max_num_batched_tokens": 8},
            "num_speculative_tokens is 8; a step of max_num_batched_tokens, 8, has room for a "
            "token and at most 7 drafts",
        ),
        ({"speculative_config": {"metod": "ngram"}}, "metod.*method"),
        (
            {"speculative_config": {"method": "eagle"}},
            "eagle.*auto, draft:MODEL, ngram, none, suffix",
        ),
        (
            {"speculative_config": {"method": "ngram", "prompt_lookup_max": 0}},
            "prompt_lookup_max is 0; it must be a whole number of at least 1",
        ),
        ({"speculative_config": {"method": "ngram"}, "speculative": "auto"}, "the same option"),
        (
            {
                "speculative": '{"method": "ngram", "num_speculative_tokens": 3}',
                "num_speculative_tokens": 2,
            },
            "num_speculative_tokens is given twice",
        ),
    ],
)
def test_what_is_not_a_method_is_refused(
    tiny_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(tiny_path, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}},
        {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 3}'},
        {
            "speculative": '{"method": "ngram", "num_speculative_tokens": 3, '
            '"prompt_lookup_max": 5, "prompt_lookup_min": 2}'
        },
        {"speculative": "ngram", "num_speculative_tokens": 3},
    ],
)
def test_the_config_may_be_vllms(tiny_path: Path, options: dict[str, Any]) -> None:
    with LLM(tiny_path, **options) as llm:
        assert llm.config.speculative == "ngram" and llm.config.num_speculative_tokens == 3


@pytest.mark.usefixtures("verify_all")
def test_run_prints_the_receipt(tiny_path: Path) -> None:
    words = ["run", "abcabcabc", "--raw", "-m", str(tiny_path), "-n", "30", "--ignore-eos"]
    plain = CliRunner().invoke(main, words)
    told = CliRunner().invoke(main, [*words, "--speculative", "ngram", "--stats"])
    assert told.stdout == plain.stdout
    assert " draft tokens accepted, " in told.stderr and " tokens a step, " in told.stderr
    report = json.loads(CliRunner().invoke(main, [*words, "--speculative=auto", "--json"]).stdout)
    assert report["speculation"]["num_draft_tokens"] >= report["speculation"]["num_drafts"] > 0
