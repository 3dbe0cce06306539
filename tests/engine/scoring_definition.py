"""The definitions of perplexity and KL divergence, written out in NumPy over the logprobs that the
engine gives a request for the whole vocabulary.
"""

import random
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid import LLM, SamplingParams
from pellucid.engine.loader import open_model
from pellucid.measure.divergence import Divergence
from pellucid.measure.perplexity import Perplexity

VOCAB = 261
TEXT = "".join(random.Random(0).choices("abcdefgh  ijkl.\n", k=2600))


def log_probs(path: Path, window: list[int], backend: str) -> NDArray[np.float64]:
    """[n_ctx - 1, V]: row i is what the model predicts after token i of the window."""
    with LLM(path, backend=backend) as llm:
        params = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
        rows = llm.generate([window], params, use_tqdm=False)[0].prompt_logprobs
    assert rows is not None
    table = np.empty((len(window) - 1, VOCAB))
    for i, row in enumerate(rows[1:]):
        assert row is not None and len(row) == VOCAB
        for token, logprob in row.items():
            table[i, token] = logprob.logprob
    return table


def definition(
    path: Path, protocol: str, n_ctx: int, count: int, backend: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(log-probabilities [N, V], the tokens [N] that follow) of all that is scored."""
    with open_model(path) as model:
        tokenizer = model.tokenizer
        token_ids = tokenizer.encode(TEXT.removesuffix("\n"))
    rows, targets = [], []
    for i in range(count):
        window = token_ids[i * n_ctx : (i + 1) * n_ctx]
        first = 0
        if protocol == "llama.cpp":
            first = n_ctx // 2
            if tokenizer.add_bos:
                assert tokenizer.bos_token_id is not None
                window[0] = tokenizer.bos_token_id
        rows.append(log_probs(path, window, backend)[first:])
        targets += window[first + 1 :]
    return np.concatenate(rows), np.array(targets)


def check_divergence(
    found: Perplexity | Divergence,
    rows: NDArray[np.float64],
    base: NDArray[np.float64],
    targets: NDArray[np.int64],
    rel: float,
) -> None:
    assert isinstance(found, Divergence)
    kl = (np.exp(base) * (base - rows)).sum(axis=1)
    i = np.arange(len(rows))
    nll, base_nll = -rows[i, targets], -base[i, targets]
    p, root = np.exp(-nll) - np.exp(-base_nll), np.sqrt(len(rows) - 1)
    same = rows.argmax(axis=1) == base.argmax(axis=1)
    # llama.cpp's way to the paired error: by the covariance
    covariance = np.mean(nll * base_nll) - nll.mean() * base_nll.mean()
    paired = np.sqrt(nll.var() + base_nll.var() - 2 * covariance) / root
    ratio, rms = np.exp(nll.mean() - base_nll.mean()), np.sqrt(np.mean(p**2))
    expected = {
        "kl": (kl.mean(), kl.std() / root),
        "ratio": (ratio, ratio * paired),
        "same_top": (same.mean(), np.sqrt(same.mean() * (1 - same.mean())) / root),
        "delta_p": (p.mean(), p.std() / root),
        "delta_p_rms": (rms, (p**2).std() / root / 2 / rms),
    }
    for name, (value, error) in expected.items():
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(value, rel=rel), name
        assert estimate.error == pytest.approx(error, rel=rel), name
    for name, share in {"kl_median": 0.5, "kl_99": 0.99, "kl_999": 0.999, "kl_max": 1}.items():
        assert getattr(found, name) == pytest.approx(np.quantile(kl, share), rel=rel), name
    assert found.model.perplexity == pytest.approx(np.exp(nll.mean()), rel=rel)
    assert found.base.perplexity == pytest.approx(np.exp(base_nll.mean()), rel=rel)
