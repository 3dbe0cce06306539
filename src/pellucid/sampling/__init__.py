"""Logits to tokens. `sample` draws tokens and `top_logprobs` reports their probabilities. No token
depends on the other rows of its batch.

`SamplingParams` documents the order in which its parameters act. Random numbers are a function of
(seed, position, token id), see `noise.py`.
"""

from .logprobs import top_logprobs
from .row import SamplingRow, check_token_ids
from .sampler import sample

__all__ = ["SamplingRow", "check_token_ids", "sample", "top_logprobs"]
