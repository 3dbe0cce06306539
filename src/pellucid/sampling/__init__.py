"""Logits to tokens. `sample` chooses, `top_logprobs` reports, and both look at one row at a time:
no token depends on its neighbours.

The order in which parameters act is written at `SamplingParams`. The randomness is `noise.py`'s: a
function of (seed, position, token id).
"""

from .logprobs import top_logprobs
from .row import SamplingRow, check_token_ids
from .sampler import sample

__all__ = ["SamplingRow", "check_token_ids", "sample", "top_logprobs"]
