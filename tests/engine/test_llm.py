"""`LLM` as its users call it, on a tiny random model."""

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pellucid import LLM, SamplingParams
from pellucid.engine.prompts import Prompt
from pellucid.errors import CapacityError, ConfigError, RequestError
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The capital", "A", "of France is a town that one cannot see from here"]


def _tokens(llm: LLM, prompts: object, params: object) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]  # type: ignore[arg-type]


def test_outputs_have_vllms_shape_and_the_order_of_the_prompts(tiny: LLM) -> None:
    outputs = tiny.generate(PROMPTS, GREEDY)
    assert [o.prompt for o in outputs] == PROMPTS
    for output in outputs:
        assert output.finished and output.prompt_token_ids == tiny.tokenizer.encode(
            output.prompt or ""
        )
        (completion,) = output.outputs
        assert (
            completion.index == 0 and completion.finish_reason == "length" and completion.finished()
        )
        assert len(completion.token_ids) == 12
        assert completion.text == tiny.tokenizer.decode(completion.token_ids)
        times = output.metrics
        assert times.time_in_queue is not None and times.time_in_queue >= 0
        reached = [
            times.arrival_time,
            times.first_scheduled_time,
            times.first_token_time,
            times.last_token_time,
            times.finished_time,
        ]
        assert reached == sorted(t for t in reached if t is not None)


def test_every_form_of_a_prompt_gives_the_same_tokens(tiny: LLM) -> None:
    ids = tiny.tokenizer.encode(PROMPTS[0])
    forms: list[object] = [
        PROMPTS[0],
        ids,
        {"prompt": PROMPTS[0]},
        {"prompt_token_ids": ids},
        [PROMPTS[0]],
        [ids],
    ]
    first, *rest = [_tokens(tiny, form, GREEDY) for form in forms]
    assert all(tokens == first for tokens in rest)
    with pytest.raises(RequestError, match="'prompt' or 'prompt_token_ids'"):
        tiny.generate({"text": "x"})


@pytest.mark.parametrize("budget", [1, 3, 16])
def test_cached_equals_uncached_whatever_the_chunks(
    tiny: LLM, tiny_path: Path, backend: str, budget: int
) -> None:
    """Each token is computed once, from the cache; one pass over the whole text gives the same
    choices and logprobs.

    On the native backend bit for bit; NumPy's BLAS sums in an order that depends on the number of
    rows.
    """
    chunked = LLM(tiny_path, backend=backend, max_num_batched_tokens=budget, block_size=48)
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)
    for prompt in PROMPTS:
        ids = tiny.tokenizer.encode(prompt)
        (cached,) = chunked.generate([ids], params)
        (uncached,) = tiny.generate(
            [ids + cached.outputs[0].token_ids], SamplingParams(max_tokens=1, prompt_logprobs=1)
        )
        assert cached.outputs[0].logprobs and uncached.prompt_logprobs
        for token, row, whole in zip(
            cached.outputs[0].token_ids,
            cached.outputs[0].logprobs,
            uncached.prompt_logprobs[len(ids) :],
            strict=True,
        ):
            assert whole is not None and whole[token].rank == 1
            np.testing.assert_allclose(
                row[token].logprob,
                whole[token].logprob,
                rtol=0,
                atol=0 if backend == "native" else 2e-5,
            )


def test_a_seed_gives_the_same_text_whatever_else_runs(tiny: LLM) -> None:
    params = SamplingParams(temperature=1.5, seed=11, max_tokens=16, ignore_eos=True)
    alone = _tokens(tiny, PROMPTS[0], params)
    other = SamplingParams(temperature=2.0, max_tokens=5)
    among = _tokens(tiny, [PROMPTS[1], PROMPTS[0], PROMPTS[2]], [other, params, other])
    assert among[1] == alone[0]
    assert (
        _tokens(
            tiny,
            PROMPTS[0],
            SamplingParams(temperature=1.5, seed=12, max_tokens=16, ignore_eos=True),
        )
        != alone
    )


def test_requests_without_a_seed_differ_but_an_engine_repeats_itself(
    tiny_path: Path, backend: str
) -> None:
    params = SamplingParams(temperature=1.5, max_tokens=16, ignore_eos=True)
    first = _tokens(LLM(tiny_path, backend=backend, seed=3), [PROMPTS[0]] * 2, params)
    assert first[0] != first[1]
    assert _tokens(LLM(tiny_path, backend=backend, seed=3), [PROMPTS[0]] * 2, params) == first


def test_n_completions_are_those_of_neighbouring_seeds(tiny: LLM) -> None:
    params = {"temperature": 1.5, "max_tokens": 8, "ignore_eos": True}
    (output,) = tiny.generate(PROMPTS[0], SamplingParams(n=3, seed=5, prompt_logprobs=0, **params))  # type: ignore[arg-type]
    assert [c.index for c in output.outputs] == [0, 1, 2]
    alone = [_tokens(tiny, PROMPTS[0], SamplingParams(seed=5 + i, **params))[0] for i in range(3)]  # type: ignore[arg-type]
    assert [c.token_ids for c in output.outputs] == alone
    assert output.prompt_logprobs and len(output.prompt_logprobs) == len(output.prompt_token_ids)


def test_logprobs_are_those_of_the_models_own_distribution(tiny: LLM) -> None:
    (output,) = tiny.generate(
        PROMPTS[2],
        SamplingParams(temperature=2.0, seed=1, max_tokens=4, logprobs=-1, prompt_logprobs=3),
    )
    completion = output.outputs[0]
    assert completion.logprobs and output.prompt_logprobs and output.prompt_logprobs[0] is None
    for token, row in zip(completion.token_ids, completion.logprobs, strict=True):
        values = np.array([x.logprob for x in row.values()])
        assert len(row) == tiny.model_config.vocab_size
        np.testing.assert_allclose(np.exp(values).sum(), 1, rtol=1e-6)
        assert row[token].rank == 1 + (values > row[token].logprob).sum()
        assert row[token].decoded_token == tiny.tokenizer.token_text(token)
    assert completion.cumulative_logprob == sum(
        r[t].logprob for t, r in zip(completion.token_ids, completion.logprobs, strict=True)
    )
    for token, prompt_row in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert prompt_row is not None and token in prompt_row and 3 <= len(prompt_row) <= 4


def test_a_stop_string_ends_the_text_before_it_across_token_borders(tiny: LLM) -> None:
    (free,) = tiny.generate(PROMPTS[0], GREEDY)
    text = free.outputs[0].text
    stop = text[3:6]
    (stopped,) = tiny.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
    )
    completion = stopped.outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (
        text[: text.index(stop)],
        "stop",
        stop,
    )
    (kept,) = tiny.generate(
        PROMPTS[0],
        SamplingParams(
            temperature=0,
            max_tokens=12,
            ignore_eos=True,
            stop=stop,
            include_stop_str_in_output=True,
        ),
    )
    assert kept.outputs[0].text == text[: text.index(stop)] + stop


def test_a_stop_token_counts_as_a_token_but_not_as_text(tiny: LLM) -> None:
    (free,) = tiny.generate(PROMPTS[0], GREEDY)
    token = free.outputs[0].token_ids[2]
    (stopped,) = tiny.generate(
        PROMPTS[0],
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[token]),
    )
    ids = free.outputs[0].token_ids[: free.outputs[0].token_ids.index(token) + 1]
    assert stopped.outputs[0].token_ids == ids
    assert stopped.outputs[0].stop_reason == token
    assert stopped.outputs[0].text == tiny.tokenizer.decode(ids[:-1])


def test_streaming_grows_to_what_generate_returns(tiny: LLM) -> None:
    (whole,) = tiny.generate(PROMPTS[0], GREEDY)
    steps = list(tiny.stream(PROMPTS[0], GREEDY))
    assert [len(s.outputs[0].token_ids) for s in steps] == list(range(1, 13))
    assert all(
        b.outputs[0].text.startswith(a.outputs[0].text) for a, b in itertools.pairwise(steps)
    )
    assert steps[-1].outputs == whole.outputs
    assert [s.finished for s in steps] == [False] * 11 + [True]


def test_closing_a_stream_frees_what_it_held(tiny: LLM) -> None:
    stream = tiny.stream(PROMPTS[0], SamplingParams(max_tokens=50, ignore_eos=True))
    next(stream)
    assert tiny.stats().num_running == 1
    stream.close()
    stats = tiny.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_held_blocks) == (0, 0, 0)


def test_chat_renders_the_template_and_reads_its_special_tokens(tiny: LLM) -> None:
    messages = [{"role": "user", "content": "Hi <|im_end|>"}]
    (output,) = tiny.chat(messages, GREEDY)
    im_start, im_end = 258, 259
    ids = output.prompt_token_ids
    assert ids[0] == im_start and ids.count(im_start) == 2 and im_end in ids
    assert tiny.chat([messages, messages], GREEDY)[1].outputs == output.outputs
    assert list(tiny.chat_stream(messages, GREEDY))[-1].outputs == output.outputs


def test_a_poisoned_request_fails_alone(tiny: LLM) -> None:
    nothing_left = SamplingParams(
        temperature=0, allowed_token_ids=[65], bad_words=["A"], max_tokens=4
    )
    outputs = tiny.generate(["x", "x"], [nothing_left, GREEDY])
    assert outputs[0].outputs[0].finish_reason == "error"
    assert isinstance(outputs[0].outputs[0].stop_reason, str)
    assert outputs[1].outputs[0].finish_reason == "length"


def test_bad_words_do_not_appear(tiny: LLM) -> None:
    (free,) = tiny.generate(PROMPTS[0], GREEDY)
    word = next(c for c in free.outputs[0].text if c.isascii() and c.isprintable())
    (output,) = tiny.generate(
        PROMPTS[0], SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, bad_words=[word])
    )
    assert word not in output.outputs[0].text


def test_the_engines_thread_tokenizes_nothing(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even bad words: its steps wait for nobody."""
    threads: list[threading.Thread] = []
    encode = tiny.tokenizer.encode

    def note(*args: Any, **options: Any) -> list[int]:
        threads.append(threading.current_thread())
        return encode(*args, **options)

    monkeypatch.setattr(tiny.tokenizer, "encode", note)
    tiny.generate("hello", SamplingParams(max_tokens=2, bad_words=["word"] * 20))
    assert len(threads) > 2 and set(threads) == {threading.current_thread()}


def test_what_cannot_be_served_is_refused_and_nothing_runs(tiny: LLM) -> None:
    prompts: list[Prompt] = ["ok", [65] * 200]
    with pytest.raises(RequestError, match=r"200 tokens.*at most 95"):
        tiny.generate(prompts, GREEDY)
    with pytest.raises(RequestError, match="token id 9999 is outside"):
        tiny.generate([[9999]], GREEDY)
    with pytest.raises(RequestError, match="empty"):
        tiny.generate([""], GREEDY)
    with pytest.raises(RequestError, match="2 sampling_params are given for 1"):
        tiny.generate(["x"], [GREEDY, GREEDY])
    assert tiny.stats().num_running == tiny.stats().num_waiting == 0


def test_a_context_that_does_not_fit_is_refused_with_the_arithmetic(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(
        CapacityError,
        match=r"holds a request of 32 tokens; "
        r"max_model_len needs 64 tokens in 4 blocks of 16 tokens · 2.0 kB",
    ):
        LLM(tiny_path, max_model_len=64, kv_cache_memory=128 * 32)
    with pytest.raises(ConfigError, match="made for at most 96"):
        LLM(tiny_path, max_model_len=97)
    with pytest.raises(CapacityError, match="kv_cache_memory is"):
        LLM(tiny_path, kv_cache_memory=1 << 50)
    llm = LLM(tiny_path, kv_cache_memory=128 * 32)
    assert llm.max_model_len == 32
    assert "max_model_len is lowered from 96 to 32" in caplog.text
    assert (
        len(
            llm.generate("x", SamplingParams(max_tokens=None, ignore_eos=True))[0]
            .outputs[0]
            .token_ids
        )
        == 31
    )


def test_the_default_sampling_params_are_what_the_model_recommends(
    tiny_path: Path, tmp_path: Path
) -> None:
    path = tmp_path / "recommends.gguf"
    with GGUFFile.open(tiny_path) as file:
        said = {**file.metadata.typed(), "general.sampling.temp": 0.25, "general.sampling.top_k": 7}
        write_gguf(path, said, ((name, file.tensor(name)) for name in file.tensors))
    assert LLM(path).get_default_sampling_params() == SamplingParams(temperature=0.25, top_k=7)
    assert LLM(tiny_path).get_default_sampling_params() == SamplingParams()
