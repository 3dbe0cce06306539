"""What becomes of evicted blocks when the file for them cannot be had."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from pellucid import LLM, SamplingParams
from pellucid.errors import CapacityError

PROMPTS = ["a" * 40, "b" * 40, "c" * 40]
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
MEMORY = 16 * 64 * 2 * 6  # six blocks: one request, and part of a second


def _full_disk(*_: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_auto_computes_again_and_says_so_once(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = [o.outputs[0].token_ids for o in LLM(tiny_path).generate(PROMPTS, PARAMS)]
    monkeypatch.setattr(os, "posix_fallocate", _full_disk)
    llm = LLM(tiny_path, max_model_len=64, kv_cache_memory=MEMORY)
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == expected
    said = [
        r.message
        for r in caplog.records
        if "blocks that are evicted will be computed again" in r.message
    ]
    assert len(said) == 1
    assert "swap_space" in said[0]


def test_swap_is_had_or_refused_at_loading(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CapacityError, match="swap_space is 100 B; one block takes"):
        LLM(tiny_path, preemption="swap", swap_space=100 / (1 << 30))
    monkeypatch.setattr(os, "posix_fallocate", _full_disk)
    with pytest.raises(CapacityError, match="cannot be had"):
        LLM(tiny_path, preemption="swap", swap_space=1 / 1024)
