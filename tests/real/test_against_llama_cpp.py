"""Real models against llama.cpp: the same ids, the same choices, the same perplexity, within what its quantized activations explain.

llama.cpp multiplies quantized weights with activations that it rounds to 8 bits; the reference backend keeps them in float32. So logits
differ by noise, and where two candidates lie closer together than that noise, either may win. The golden files hold llama.cpp's own logits
at each step, which makes that a statement to be tested: the noise of a logit is measured over all candidates of all steps, and a choice
may differ only where both engines saw less than four standard deviations of the noise of a difference, which is sqrt(2) times as large,
between the two.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pellucid import LLM, SamplingParams
from pellucid.measure.perplexity import measure_perplexity

GOLDEN = Path(__file__).parent.parent / "golden" / "llama_cpp"
MODELS = ["smollm2-135m-instruct-q4_1", "gemma-3-270m-q4_k_m", "qwen2.5-coder-0.5b-q4"]
# "Final estimate" of `llama-perplexity -f wiki.test.raw --chunks 20` of llama-cpp-python 0.3.36, for each model:
# - `-m FILE`: activations in 8 bits, keys and values in float16, flash attention
# - `-m FILE -ctk f32 -ctv f32 -fa off`: activations in 8 bits, the rest in float32
# - the same, and FILE decoded by `llama-quantize --allow-requantize FILE F32`: float32 throughout, as the reference backend computes
PERPLEXITY = {
    "smollm2-135m-instruct-q4_1": (28.7572, 28.6978, 28.6245),
    "gemma-3-270m-q4_k_m": (19.0643, 19.0048, 18.9504),
    "qwen2.5-coder-0.5b-q4": (38.1012, 38.1276, 38.0932),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, real_model: Callable[[str], Path]) -> tuple[str, LLM]:
    """Each real model in turn; one is in memory at a time."""
    return request.param, LLM(real_model(request.param), backend="reference", max_model_len=1024)


def test_greedy_continuations_are_llama_cpps_up_to_its_quantization_noise(model: tuple[str, LLM]) -> None:
    name, llm = model
    golden = json.loads((GOLDEN / f"{name}.json").read_text())["continuations"]
    assert len(golden) == 8 and all(len(g["token_ids"]) >= 64 for g in golden)
    differences: list[float] = []  # ours minus llama.cpp's, over its five best candidates, without each step's common shift
    partings: list[tuple[float, float]] = []  # (our margin, llama.cpp's margin) where the choices differ
    for g in golden:
        ids, theirs = g["prompt_token_ids"], g["token_ids"]
        assert llm.tokenizer.encode(g["prompt"]) == ids
        # llama.cpp's own continuation as the prompt: each of its 64 choices is judged in the context in which it was made.
        (output,) = llm.generate([ids + theirs], SamplingParams(max_tokens=1, prompt_logprobs=32), use_tqdm=False)
        rows = (output.prompt_logprobs or [])[len(ids) :]
        for row, token, top in zip(rows, theirs, g["top"], strict=True):
            assert row is not None
            best = next(t for t, x in row.items() if x.rank == 1)
            known = [(row[t].logprob, logit) for t, logit in top if t in row]
            delta = np.array([ours - logit for ours, logit in known])
            differences += list(delta - delta.mean())
            if best != token:
                their_logits = dict(map(tuple, top))
                assert best in their_logits, f"{g['prompt']!r}: {best} is our choice, and not among llama.cpp's five best"
                partings.append((row[best].logprob - row[token].logprob, their_logits[token] - their_logits[best]))
    noise = float(np.std(differences))
    print(f"{name}: {len(partings)} of {8 * 64} choices differ; noise of a logit {noise:.4f}; margins {partings}")
    assert noise < 0.5
    assert all(max(ours, theirs) < 4 * 2**0.5 * noise for ours, theirs in partings), (noise, partings)
    assert len(partings) <= 8 * 64 // 20


def test_greedy_generation_is_llama_cpps_until_a_choice_within_the_noise(model: tuple[str, LLM]) -> None:
    """The same through decoding itself, token by token from the cache, for as long as the two agree."""
    name, llm = model
    golden = json.loads((GOLDEN / f"{name}.json").read_text())["continuations"]
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, logprobs=5)
    agreed = 0
    for g, output in zip(golden, llm.generate([g["prompt_token_ids"] for g in golden], params, use_tqdm=False), strict=True):
        completion = output.outputs[0]
        part = next((i for i, (a, b) in enumerate(zip(completion.token_ids, g["token_ids"], strict=True)) if a != b), 64)
        agreed += part
        if part < 64:
            ours, theirs = completion.token_ids[part], g["token_ids"][part]
            row, top = (completion.logprobs or [])[part], dict(map(tuple, g["top"][part]))
            assert theirs in row and ours in top
            assert row[ours].logprob - row[theirs].logprob < 1.0 and top[theirs] - top[ours] < 1.0
    print(f"{name}: {agreed} of {8 * 64} tokens agree before the first parting of each prompt")
    # With choices that part at some 2 % of the tokens, half of them come before the first parting; a broken cache parts at once.
    assert agreed >= 8 * 64 // 4


def test_perplexity_of_twenty_chunks_is_llama_perplexitys(model: tuple[str, LLM], data_dir: Path) -> None:
    name, llm = model
    text = (data_dir / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    *_, result = measure_perplexity(llm, text, max_chunks=20)
    as_shipped, float32_cache, float32_weights = PERPLEXITY[name]
    print(f"{name}: perplexity {result.perplexity:.4f}; llama-perplexity {as_shipped}, {float32_cache}, {float32_weights}")
    assert (result.num_chunks, result.num_scored_tokens) == (20, 20 * 255)
    assert abs(result.perplexity / float32_weights - 1) < 0.0001  # the same arithmetic: the same figure
    assert abs(result.perplexity / float32_cache - 1) < 0.005  # what 8-bit activations cost llama.cpp
    assert abs(result.perplexity / as_shipped - 1) < 0.0075  # and a float16 cache besides: most for Gemma, 0.6 %
