"""OpenAI's own client: text completions, whole and streamed, and what is refused."""

import math
from typing import Any

import openai
import pytest

from tests.server.conftest import Server


@pytest.fixture(params=["server", "smol"])
def each(request: pytest.FixtureRequest) -> Server:
    """The tiny model's server, then SmolLM2's."""
    found: Server = request.getfixturevalue(request.param)
    return found


def ask(server: Server, **fields: Any) -> Any:
    """A completion; fields that the client does not know go into extra_body."""
    known = {"prompt", "n", "echo", "logprobs", "stop", "seed", "stream", "suffix", "best_of",
             "max_tokens", "temperature", "stream_options", "logit_bias", "user",
             "presence_penalty", "frequency_penalty", "top_p", "model"}  # fmt: skip
    extra = {name: value for name, value in fields.items() if name not in known}
    given = {name: value for name, value in fields.items() if name in known}
    name = "smol" if "smol" in str(server.log) else "tiny"
    asked: Any = {"model": name, "prompt": "A ", "max_tokens": 8, "seed": 3} | given
    return server.client().completions.create(**asked, extra_body=extra)


def refusal(server: Server, **fields: Any) -> openai.APIStatusError:
    """The error of a request that is refused."""
    with pytest.raises(openai.APIStatusError) as caught:
        ask(server, **fields)
    return caught.value


def texts(chunks: Any) -> dict[int, str]:
    """The text of each choice of a stream."""
    found: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            found[choice.index] = found.get(choice.index, "") + choice.text
    return found


@pytest.mark.parametrize("n", [1, 2, 5])
def test_several_answers(each: Server, n: int) -> None:
    answer = ask(each, n=n, temperature=1.0)
    assert [choice.index for choice in answer.choices] == list(range(n))
    assert answer.usage.completion_tokens <= 8 * n
    assert texts(ask(each, n=n, temperature=1.0, stream=True)) == {
        choice.index: choice.text for choice in answer.choices
    }


@pytest.mark.parametrize("n", [1, 2])
def test_several_prompts(each: Server, n: int) -> None:
    answer = ask(each, prompt=["A ", "B ", "C "], n=n)
    assert [choice.index for choice in answer.choices] == list(range(3 * n))
    alone = [ask(each, prompt=prompt, n=n) for prompt in ("A ", "B ", "C ")]
    assert [c.text for c in answer.choices] == [c.text for a in alone for c in a.choices]
    assert answer.usage.prompt_tokens == sum(a.usage.prompt_tokens for a in alone)


def test_token_ids_are_prompts_too(each: Server) -> None:
    by_text = ask(each, prompt="A ", return_token_ids=True).choices[0]
    ids = by_text.prompt_token_ids
    by_ids = ask(each, prompt=ids, return_token_ids=True).choices[0]
    assert by_ids.text == by_text.text and by_ids.token_ids == by_text.token_ids
    both = ask(each, prompt=[ids, ids])
    assert [choice.text for choice in both.choices] == [by_text.text] * 2


@pytest.mark.parametrize("is_stream", [False, True])
def test_echo_begins_with_the_prompt(each: Server, is_stream: bool) -> None:
    plain = ask(each).choices[0].text
    answer = ask(each, echo=True, stream=is_stream)
    text = texts(answer)[0] if is_stream else answer.choices[0].text
    assert text == "A " + plain


def test_echo_alone_scores_the_prompt(each: Server) -> None:
    choice = ask(each, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert choice.text == "A "
    values = choice.logprobs.token_logprobs
    assert values[0] is None and all(value <= 0 for value in values[1:])
    assert "".join(choice.logprobs.tokens) == "A "


@pytest.mark.parametrize("count", [0, 1, 5, 20])
def test_logprobs(each: Server, count: int) -> None:
    found = ask(each, logprobs=count, return_token_ids=True).choices[0]
    scores = found.logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(found.token_ids)
    assert all(len(top) <= max(1, count) for top in scores.top_logprobs)
    assert all(value <= 0 for value in scores.token_logprobs)


def test_logprobs_are_the_same_in_a_stream(each: Server) -> None:
    whole = ask(each, logprobs=2).choices[0].logprobs
    chunks = [c.choices[0].logprobs for c in ask(each, logprobs=2, stream=True)]
    pieces = [p for p in chunks if p is not None]
    assert [v for p in pieces for v in p.token_logprobs] == whole.token_logprobs
    assert [o for p in pieces for o in p.text_offset] == whole.text_offset


@pytest.mark.parametrize("is_stream", [False, True])
def test_candidates_that_are_ruled_out_are_no_broken_json(each: Server, is_stream: bool) -> None:
    """A token that may not come has the logprob -inf, which JSON does not know."""
    ids = ask(each, return_token_ids=True, ignore_eos=True).choices[0].token_ids[:2]
    answer = ask(each, allowed_token_ids=ids, logprobs=20, stream=is_stream, prompt_logprobs=5)
    answers = list(answer) if is_stream else [answer]
    for found in answers:
        for choice in found.choices:
            for top in (choice.logprobs.top_logprobs or []) if choice.logprobs else []:
                assert all(math.isfinite(value) for value in top.values())


def test_stop_strings_are_left_out(each: Server) -> None:
    text = ask(each, max_tokens=40, ignore_eos=True).choices[0].text
    stop = text[10:12]
    place = text.index(stop)
    choice = ask(each, max_tokens=40, ignore_eos=True, stop=stop).choices[0]
    assert choice.text == text[:place]
    assert choice.finish_reason == "stop" and choice.stop_reason == stop
    assert texts(ask(each, max_tokens=40, ignore_eos=True, stop=[stop, "\0"], stream=True)) == {
        0: text[:place]
    }
    kept = ask(each, max_tokens=40, ignore_eos=True, stop=stop, include_stop_str_in_output=True)
    assert kept.choices[0].text == text[: place + len(stop)]


def test_stop_token_ids_end_an_answer(each: Server) -> None:
    ids = ask(each, return_token_ids=True, ignore_eos=True).choices[0].token_ids
    place = ids.index(ids[4])
    choice = ask(each, return_token_ids=True, stop_token_ids=[ids[4]]).choices[0]
    assert len(choice.token_ids) <= place + 1 and choice.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_a_seed_gives_the_same_text_streamed_or_not(each: Server, temperature: float) -> None:
    fields = {"temperature": temperature, "max_tokens": 30, "seed": 11}
    first, second = (ask(each, **fields).choices[0].text for _ in range(2))
    assert first == second == texts(ask(each, **fields, stream=True))[0]


def test_seeds_differ(each: Server) -> None:
    found = {ask(each, temperature=1.5, seed=s, max_tokens=20).choices[0].text for s in range(4)}
    assert len(found) > 1


def test_usage_comes_last_in_a_stream(each: Server) -> None:
    chunks = list(ask(each, stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens > 0
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1


def test_structured_outputs(each: Server) -> None:
    answer = ask(each, structured_outputs={"choice": ["red", "green"]}, max_tokens=20)
    assert answer.choices[0].text in ("red", "green")
    answer = ask(each, structured_outputs={"regex": "[0-9]{3}"}, max_tokens=20, logprobs=20)
    assert answer.choices[0].text.isdigit() and len(answer.choices[0].text) == 3


def test_fields_of_other_servers(each: Server) -> None:
    answer = ask(
        each, user="someone", priority=5, cache_salt="a", min_p=0.1, top_k=5,
        repetition_penalty=1.1, presence_penalty=0.1, frequency_penalty=0.1, min_tokens=2,
        logit_bias={"5": -100}, skip_special_tokens=False, truncate_prompt_tokens=4,
        something_unknown=1,
    )  # fmt: skip
    assert answer.choices[0].text


def test_the_timings_of_a_request_are_told(each: Server) -> None:
    timings = ask(each, ignore_eos=True).timings
    assert timings["predicted_n"] == 8 and timings["predicted_ms"] >= 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "b"}, "suffix"),
        ({"best_of": 3}, "best_of"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"prompt": "a " * 5000}, "prompt"),
        ({"n": 0}, "n"),
        ({"n": -1}, "n"),
        ({"n": 2.5}, "n"),
        ({"n": True}, "n"),
        ({"n": 10**40}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10**40}, "max_tokens"),
        ({"temperature": 1e308}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -5}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"seed": 10**40}, "seed"),
        ({"seed": "a"}, "seed"),
        ({"presence_penalty": 1e9}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": "a" * 100_000}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**30]}, "stop_token_ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1e308}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**30]}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 10**30}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 10**40}, "truncate_prompt_tokens"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"priority": 10**40}, "priority"),
        ({"priority": "high"}, "priority"),
        ({"cache_salt": 5}, "cache_salt"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a" * 1_000_000}}, "structured_outputs"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs"),
        ({"structured_outputs": {"unknown": 1}}, "structured_outputs"),
        ({"structured_outputs": {"json": {"type": "x"}}}, "structured_outputs"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
    ],
)
def test_what_is_wrong_is_named(server: Server, fields: dict[str, Any], param: str) -> None:
    error = refusal(server, **fields)
    assert error.status_code == 400, error
    assert (error.param or "").split(".")[0] == param, error
    assert len(error.message) < 1500


def test_another_model_is_not_found(server: Server) -> None:
    assert refusal(server, model="../../etc/passwd").status_code == 404
