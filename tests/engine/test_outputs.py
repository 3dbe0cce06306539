"""Outputs in vLLM's shapes: logprobs with text and bytes, times, and token ids without text."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest

from pellucid import LLM, EngineConfig, RequestOutput, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.loader import build_engine
from pellucid.engine.prompts import TokenizedPrompt

VOCAB = 261  # of the tiny model, whose first 256 tokens are bytes


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path, backend="reference", max_num_seqs=1)


def answer(llm: LLM, prompt: object, **fields: object) -> RequestOutput:
    shape = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, **fields}
    params = SamplingParams(**shape)  # type: ignore[arg-type]
    return llm.generate(prompt, params, use_tqdm=False)[0]  # type: ignore[arg-type]


def test_parts_of_a_character_have_their_bytes_and_a_replacement_as_text(llm: LLM) -> None:
    output = answer(llm, "é€", prompt_logprobs=0)
    assert output.prompt_token_ids == list("é€".encode())
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    told = [
        row[token]
        for row, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
        if row is not None
    ]
    assert b"".join(entry.token_bytes or b"" for entry in told) == "é€".encode()[1:]
    assert [entry.decoded_token for entry in told] == ["\ufffd"] * 4


def test_minus_one_reports_the_whole_vocabulary(llm: LLM) -> None:
    output = answer(llm, "ab", logprobs=-1, prompt_logprobs=-1)
    completion = output.outputs[0]
    assert completion.logprobs is not None and output.prompt_logprobs is not None
    assert [len(row) for row in completion.logprobs] == [VOCAB] * 4
    assert [row and len(row) for row in output.prompt_logprobs] == [None, VOCAB]
    first = completion.logprobs[0]
    assert sorted(entry.rank for entry in first.values())[0] == 1
    assert completion.cumulative_logprob == pytest.approx(
        sum(
            row[t].logprob for row, t in zip(completion.logprobs, completion.token_ids, strict=True)
        )
    )


def test_without_text_there_are_ids_and_logprobs_alone(llm: LLM) -> None:
    text = answer(llm, "ab", logprobs=2).outputs[0]
    ids = answer(llm, "ab", logprobs=2, detokenize=False).outputs[0]
    assert (ids.text, ids.token_ids) == ("", text.token_ids)
    assert text.logprobs is not None and ids.logprobs is not None
    for with_text, without in zip(text.logprobs, ids.logprobs, strict=True):
        assert [e.decoded_token for e in without.values()] == [None] * len(without)
        assert all(isinstance(e.decoded_token, str) for e in with_text.values())
        assert [e.logprob for e in with_text.values()] == [e.logprob for e in without.values()]


def test_times_of_a_request_that_waits_say_how_long(llm: LLM) -> None:
    first, second = llm.generate(
        ["ab", "cd"], SamplingParams(max_tokens=6, ignore_eos=True, n=2), use_tqdm=False
    )
    for output in (first, second):
        times = output.metrics
        assert times.first_scheduled_time is not None and times.time_in_queue is not None
        assert times.time_in_queue == times.first_scheduled_time - times.arrival_time
        assert all(completion.finished() for completion in output.outputs)
    assert second.metrics.arrival_time < first.metrics.finished_time  # type: ignore[operator]
    assert second.metrics.first_scheduled_time > first.metrics.first_token_time  # type: ignore[operator]


def test_an_engine_without_a_seed_draws_other_tokens_at_every_start(tiny_path: Path) -> None:
    def draw(seed: int | None) -> list[int]:
        engine = LLM(tiny_path, backend="reference", seed=seed)
        return answer(engine, "ab", temperature=1.0, max_tokens=40).outputs[0].token_ids

    assert draw(0) == draw(0)
    assert draw(None) != draw(None)


def test_an_output_keeps_its_tokens_while_its_request_goes_on(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    outputs = [output.outputs[0] for output in llm.stream("ab", params)]
    copies = [pickle.loads(pickle.dumps(completion)) for completion in outputs]
    assert [completion.num_tokens for completion in outputs] == [1, 2, 3, 4, 5, 6]
    whole = outputs[-1].token_ids
    assert [completion.token_ids for completion in outputs] == [whole[:n] for n in range(1, 7)]
    assert copies == outputs and replace(outputs[2]) == outputs[2]
    assert f"token_ids={whole[:3]}" in repr(outputs[2])
    # A reader may change what it was given.
    outputs[3].token_ids.append(-1)
    assert outputs[4].token_ids == whole[:5]
    with pytest.raises(AttributeError, match="'tokens'"):
        _ = outputs[0].tokens  # type: ignore[attr-defined]


def test_a_reader_of_whole_answers_gets_no_output_before(tiny_path: Path) -> None:
    core = build_engine(tiny_path, EngineConfig()).core
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, n=2)
    prompt = TokenizedPrompt([65, 66], None)
    core.add_requests([Submission("a", prompt, params, only_whole=True)])
    core.add_requests([Submission("b", prompt, params)])
    steps = []
    while core.has_unfinished:
        steps.append([(output.request_id, output.finished) for output in core.step()])
    assert [name for step in steps for name, _ in step].count("a") == 1
    assert ("a", True) in steps[-1] and len(steps) > 2
    assert all(("b", False) in step for step in steps[:-1])
