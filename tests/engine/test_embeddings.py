"""Embeddings: what they are, and that nothing changes a bit of them."""

import asyncio
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid import LLM, PoolingParams, RequestOutput, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import build_engine
from pellucid.engine.options import build_engine_config
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.errors import ConfigError, PellucidError, PromptTooLongError, RequestError
from pellucid.formats import dequantize
from pellucid.outputs import PooledOutput
from pellucid.weights.checkpoint import open_checkpoint

from .async_harness import Gate, Served, run
from .conftest import CONTEXT, HIDDEN, write_tiny

PROMPTS = ["The capital", "A", "of France is a town that one cannot see from here", "The capital"]
POOLINGS = ["last", "mean"]
LONG = [f"{letter} is a letter, and here it stands alone" * 2 for letter in "xyz"]
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)


def vectors(llm: LLM, prompts: Any, params: Any = None, **options: Any) -> NDArray[np.float64]:
    outputs = llm.embed(prompts, params, use_tqdm=False, **options)
    return np.array([output.outputs.embedding for output in outputs])


def check_same(backend: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Bit for bit on the native backend; NumPy's BLAS sums in an order that depends on the number
    of rows.
    """
    np.testing.assert_allclose(found, expected, rtol=0, atol=0 if backend == "native" else 1e-5)


def test_outputs_have_vllms_shape_and_the_order_of_the_prompts(tiny: LLM) -> None:
    outputs = tiny.embed(PROMPTS)
    assert [output.prompt for output in outputs] == PROMPTS
    for output in outputs:
        assert output.finished and output.outputs.hidden_size == HIDDEN
        assert output.prompt_token_ids == tiny.tokenizer.encode(output.prompt or "")
        assert all(type(number) is float for number in output.outputs.embedding)
        assert np.linalg.norm(output.outputs.embedding) == pytest.approx(1.0, abs=1e-6)
        times = output.metrics
        assert times.finished_time is not None and times.finished_time >= times.arrival_time
        assert times.num_output_tokens == 0 and times.time_in_decode == 0.0
        assert times.time_in_prefill is not None and times.time_in_prefill > 0
        told = times.explain()
        assert told.prefill is not None and told.decode is None
        assert told.prefill.num_tokens == len(output.prompt_token_ids) - output.num_cached_tokens
    first, *_, again = outputs
    assert first.outputs.embedding == again.outputs.embedding


def test_every_form_of_a_prompt_gives_the_same_embedding(tiny: LLM) -> None:
    ids = tiny.tokenizer.encode(PROMPTS[0])
    forms: list[object] = [PROMPTS[0], ids, {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids}]
    forms += [[PROMPTS[0]], [ids]]
    first, *rest = [vectors(tiny, form) for form in forms]
    assert all(np.array_equal(vector, first) for vector in rest)
    assert tiny.embed([]) == []


@pytest.mark.parametrize("pooling", POOLINGS)
def test_normalize_and_dimensions_cut_and_scale_the_pooled_hidden_state(
    tiny: LLM, pooling: str
) -> None:
    def embed(**fields: Any) -> NDArray[np.float64]:
        (vector,) = vectors(tiny, PROMPTS[2], PoolingParams(pooling=pooling, **fields))  # type: ignore[arg-type]
        return np.array(vector)

    raw = embed(normalize=False)
    assert np.linalg.norm(raw) > 1.5  # the final norm leaves about sqrt(HIDDEN)
    np.testing.assert_allclose(embed(), raw / np.linalg.norm(raw), rtol=1e-6)
    np.testing.assert_array_equal(embed(normalize=False, dimensions=5), raw[:5])
    short = raw[:5] / np.linalg.norm(raw[:5])
    np.testing.assert_allclose(embed(dimensions=5), short, rtol=1e-6)
    np.testing.assert_array_equal(embed(dimensions=HIDDEN), embed())


def test_mean_is_the_mean_of_the_last_tokens_of_all_prefixes(tiny: LLM) -> None:
    """A decoder's hidden state depends on the tokens up to it alone."""
    ids = tiny.tokenizer.encode(PROMPTS[2])
    prefixes = [ids[:stop] for stop in range(1, len(ids) + 1)]
    states = vectors(tiny, prefixes, PoolingParams(normalize=False))
    mean = vectors(tiny, [ids], PoolingParams(pooling="mean", normalize=False))
    np.testing.assert_allclose(mean[0], states.mean(axis=0), rtol=0, atol=1e-5)
    assert not np.allclose(mean[0], states[-1], atol=0.1)


def test_the_lm_head_makes_the_logits_of_a_last_hidden_state(tiny: LLM, tiny_path: Path) -> None:
    """So the embedding is what predicts the next token."""
    with open_checkpoint(tiny_path) as checkpoint:
        table = dequantize(dict(checkpoint.parameters())["embed_tokens.weight"])  # [V, C], tied
    (state,) = vectors(tiny, PROMPTS[2], PoolingParams(normalize=False))
    scores = table @ state
    expected = scores - np.log(np.sum(np.exp(scores - scores.max()))) - scores.max()
    (answer,) = tiny.generate(PROMPTS[2], SamplingParams(max_tokens=1, logprobs=-1))
    assert answer.outputs[0].logprobs is not None
    (row,) = answer.outputs[0].logprobs
    found = np.array([row[token].logprob for token in range(len(table))])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("budget", [1, 3, 16, 512])
def test_an_embedding_has_the_same_bits_whatever_the_chunks(
    tiny_path: Path, backend: str, budget: int, pooling: str
) -> None:
    params = PoolingParams(pooling=pooling)  # type: ignore[arg-type]
    with LLM(tiny_path, backend=backend, enable_prefix_caching=False) as whole:
        expected = [vectors(whole, [prompt], params)[0] for prompt in PROMPTS + LONG]
    options: dict[str, Any] = {"max_num_batched_tokens": budget, "max_num_seqs": 3}
    with LLM(tiny_path, backend=backend, block_size=16, **options) as chunked:
        check_same(backend, vectors(chunked, PROMPTS + LONG, params), np.array(expected))


def drive(core: EngineCore, arrivals: dict[int, list[Submission]]) -> dict[str, RequestOutput]:
    """Run a core to its end. The submissions of `arrivals` are added before steps of these numbers;
    the last outputs by request_id.
    """
    found: dict[str, RequestOutput] = {}
    for step in itertools.count():
        core.add_requests(arrivals.get(step, []))
        if not core.has_unfinished:
            assert step > max(arrivals)
            return found
        found |= {output.request_id: output for output in core.step() if output.finished}
        core.scheduler.check_integrity()
    raise AssertionError


def core_of(path: Path, backend: str, **options: Any) -> EngineCore:
    return build_engine(path, build_engine_config({"backend": backend, **options})).core


def submit(name: str, text: str, params: Any, priority: int = 0) -> Submission:
    return Submission(name, TokenizedPrompt(list(text.encode()), text, priority), params)


def test_embeddings_run_in_the_steps_of_generating_requests(tiny_path: Path, backend: str) -> None:
    """Both keep their bits."""
    kinds = {"text": GREEDY, "last": PoolingParams(), "mean": PoolingParams(pooling="mean")}
    jobs = {f"{kind} {i}": (kinds[kind], LONG[i]) for kind in kinds for i in range(3)}

    def job(name: str) -> Submission:
        return submit(name, jobs[name][1], jobs[name][0])

    alone = {
        name: drive(core_of(tiny_path, backend, enable_prefix_caching=False), {0: [job(name)]})
        for name in jobs
    }
    core = core_of(tiny_path, backend, max_num_batched_tokens=20, max_num_seqs=9)
    names = list(jobs)
    together = drive(core, {0: [job(n) for n in names[:5]], 7: [job(n) for n in names[5:]]})
    shared = [
        {name.split()[0] for name in event.request_ids}
        for event in core.scheduler.events
        if event.kind == "schedule"
    ]
    assert {"text", "last", "mean"} in shared
    for name in jobs:
        found, expected = together[name], alone[name][name]
        if isinstance(expected, PooledOutput):
            assert isinstance(found, PooledOutput) and expected.embedding is not None
            check_same(backend, np.array(found.embedding), np.array(expected.embedding))
        else:
            assert backend == "reference" or found.outputs == expected.outputs


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_preempted_embedding_has_the_same_bits(
    tiny_path: Path, backend: str, pooling: str, caching: bool
) -> None:
    """A position that is computed again is pooled once."""
    params = PoolingParams(pooling=pooling)  # type: ignore[arg-type]
    jobs = [submit(str(i), text, params, priority=-i) for i, text in enumerate(LONG)]
    whole = core_of(tiny_path, backend, enable_prefix_caching=False)
    expected = [drive(whole, {0: [job]})[job.request_id] for job in jobs]
    core = core_of(
        tiny_path,
        backend,
        enable_prefix_caching=caching,
        kv_cache_memory=16 * 64 * 2 * 6 * (1 if backend == "native" else 2),  # six blocks
        max_num_seqs=3,
        max_num_batched_tokens=20,
        scheduling_policy="priority",
    )
    found = drive(core, {2 * i: [job] for i, job in enumerate(jobs)})
    assert core.scheduler.num_preemptions >= 2
    for one in expected:
        again = found[one.request_id]
        assert isinstance(one, PooledOutput) and isinstance(again, PooledOutput)
        check_same(backend, np.array(again.embedding), np.array(one.embedding))


def test_last_reuses_cached_blocks_and_mean_computes_every_token(
    tiny_path: Path, backend: str
) -> None:
    with LLM(tiny_path, backend=backend, enable_prefix_caching=True) as llm:
        (first,) = llm.embed(LONG[0], PoolingParams(pooling="mean"))
        (mean,) = llm.embed(LONG[0], PoolingParams(pooling="mean"))
        assert first.num_cached_tokens == mean.num_cached_tokens == 0
        (last,) = llm.embed(LONG[0])
        assert last.num_cached_tokens == len(last.prompt_token_ids) - 1  # from the mean's blocks
        assert last.metrics.num_cached_tokens == last.num_cached_tokens
        check_same(backend, np.array(mean.outputs.embedding), np.array(first.outputs.embedding))
    with LLM(tiny_path, backend=backend, enable_prefix_caching=False) as llm:
        check_same(backend, vectors(llm, LONG[0])[0], np.array(last.outputs.embedding))


def test_an_answer_continues_from_the_blocks_of_an_embedding(tiny_path: Path) -> None:
    with LLM(tiny_path, enable_prefix_caching=False) as llm:
        (expected,) = llm.generate(LONG[0], GREEDY)
    with LLM(tiny_path) as llm:
        llm.embed(LONG[0], PoolingParams(pooling="mean"))
        (found,) = llm.generate(LONG[0], GREEDY)
    assert found.num_cached_tokens == len(found.prompt_token_ids) - 1
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(tiny_path: Path, threads: int) -> None:
    with LLM(tiny_path) as llm, LLM(tiny_path, threads=threads) as other:
        for pooling in POOLINGS:
            params = PoolingParams(pooling=pooling)  # type: ignore[arg-type]
            check_same("native", vectors(other, PROMPTS, params), vectors(llm, PROMPTS, params))


def test_a_prompt_may_fill_the_context_and_no_more(tiny: LLM) -> None:
    """No output follows, so no room is left for one; and nothing is cut unless it is asked for."""
    (full,) = tiny.embed("x" * CONTEXT)
    assert len(full.prompt_token_ids) == CONTEXT
    with pytest.raises(PromptTooLongError, match=f"97 tokens; it must be at most {CONTEXT} "):
        tiny.embed("x" * (CONTEXT + 1))
    with pytest.raises(PromptTooLongError, match=r"prompts\[1\] has 97 tokens"):
        tiny.embed(["y", "x" * (CONTEXT + 1)])
    with pytest.raises(PellucidError, match="tokens"):
        tiny.embed(["y", "x" * 100_000])
    text = "".join(chr(ord("a") + i % 26) for i in range(150))
    for last, length in ((-1, CONTEXT), (7, 7), (1000, None)):
        if length is None:
            with pytest.raises(PromptTooLongError):
                tiny.embed(text, truncate_prompt_tokens=last)
            continue
        (cut,) = tiny.embed(text, truncate_prompt_tokens=last)
        assert cut.prompt_token_ids == tiny.tokenizer.encode(text)[-length:]
        params = PoolingParams(truncate_prompt_tokens=last)
        assert tiny.embed(text, params)[0].outputs == cut.outputs


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"pooling": "cls"}, "pooling is 'cls'; it must be one of: last, mean"),
        ({"dimensions": 0}, "dimensions is 0; it must be"),
        ({"dimensions": True}, "dimensions is True"),
        ({"normalize": 1}, "normalize is 1"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens is -2"),
    ],
)
def test_wrong_parameters_are_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PoolingParams(**fields)


def test_what_the_model_cannot_serve_is_refused_and_nothing_is_left(tiny: LLM) -> None:
    wide = PoolingParams(dimensions=HIDDEN + 1)
    with pytest.raises(ConfigError, match=f"dimensions is {HIDDEN + 1}; .* have {HIDDEN} numbers"):
        tiny.embed(PROMPTS, wide)
    with pytest.raises(RequestError, match="the prompt is empty"):
        tiny.embed(["a", ""])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        tiny.embed([[1, 99_999]])
    with pytest.raises(RequestError, match="2 pooling_params are given for 4 prompts"):
        tiny.embed(PROMPTS, [PoolingParams()] * 2)
    with pytest.raises(ConfigError, match="pooling_params"):
        tiny.embed(PROMPTS, SamplingParams())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sampling_params"):
        tiny.generate(PROMPTS, PoolingParams())  # type: ignore[arg-type]
    changed = PoolingParams()
    changed.dimensions = -3
    with pytest.raises(ConfigError, match="dimensions is -3"):
        tiny.embed(PROMPTS, changed)
    stats = tiny.stats()
    assert stats.num_running == stats.num_waiting == stats.num_held_blocks == 0


def test_each_prompt_may_have_its_own_parameters(tiny: LLM) -> None:
    own = [PoolingParams(dimensions=3), PoolingParams(pooling="mean"), PoolingParams()]
    found = tiny.embed(LONG, own)
    for prompt, params, output in zip(LONG, own, found, strict=True):
        assert len(output.outputs.embedding) == (params.dimensions or HIDDEN)
        np.testing.assert_allclose(
            vectors(tiny, prompt, params)[0], output.outputs.embedding, rtol=0, atol=1e-5
        )


def test_an_embedding_that_is_not_finite_is_an_error_of_its_prompt_alone(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "broken.gguf", head_dim=32, ffn=64, ends=False, breaking=ord("#"))
    with LLM(path) as llm:
        for pooling in POOLINGS:
            params = PoolingParams(pooling=pooling)  # type: ignore[arg-type]
            with pytest.raises(RequestError, match=r"prompts\[1\]: the embedding is not finite"):
                llm.embed(["good", "bad #"], params)
            assert np.isfinite(vectors(llm, "good", params)).all()
        assert llm.stats().num_held_blocks == 0


def _embed_all(served: Served, prompts: Sequence[str], **fields: Any) -> Any:
    return served.engine.embed(prompts, PoolingParams(**fields))


def test_asyncio_yields_each_embedding_once_and_the_same(tiny_path: Path) -> None:
    with LLM(tiny_path) as llm:
        expected = vectors(llm, PROMPTS)

    async def main() -> None:
        served = Served(tiny_path, max_num_batched_tokens=4)
        async with served.engine:
            found = {i: output async for i, output in _embed_all(served, PROMPTS)}
            assert sorted(found) == list(range(len(PROMPTS)))
            for i, output in found.items():
                assert output.finished
                np.testing.assert_array_equal(output.embedding, expected[i])
            with pytest.raises(ConfigError, match="dimensions"):
                await anext(_embed_all(served, PROMPTS, dimensions=HIDDEN + 1))
            await served.settled()

    run(main())


def test_leaving_ends_embeddings_before_the_next_step(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        served = Served(tiny_path, max_num_batched_tokens=2)
        gate = Gate(served.core, monkeypatch)
        async with served.engine:
            task = asyncio.create_task(anext(_embed_all(served, LONG, pooling="mean")))
            await served.holds(3)
            gate.let(3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.let(1000)
            await served.settled()

    run(main())
