"""What becomes of evicted blocks when the file for them cannot be had, written or read."""

import errno
import math
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pellucid import LLM, SamplingParams
from pellucid.backends.registry import get_backend
from pellucid.batch import BlockOp
from pellucid.errors import CapacityError
from pellucid.kv.layout import build_layout
from pellucid.kv.storage import KVStorage, LostBlocksError
from pellucid.kv.swap_file import SwapFile
from pellucid.kv_spec import KVSpec

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


@pytest.mark.parametrize(("function", "good_calls"), [("pwrite", 3), ("preadv", 0)])
@pytest.mark.parametrize("preemption", ["auto", "swap"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_disk_that_fails_costs_time_and_no_answer(
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    good_calls: int,
    preemption: str,
    backend: str,
) -> None:
    options: dict[str, Any] = {"backend": backend, "enable_prefix_caching": True, "max_num_seqs": 3}
    expected = [o.outputs[0].token_ids for o in LLM(tiny_path, **options).generate(PROMPTS, PARAMS)]
    works, calls = getattr(os, function), []

    def fails(*args: Any) -> int:
        calls.append(args)
        if len(calls) > good_calls:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return int(works(*args))

    # so that `auto` saves, whatever this disk and this processor cost
    def costs_nothing(storage: KVStorage, file: SwapFile) -> None:
        storage._seconds_per_block = 0.0

    monkeypatch.setattr(KVStorage, "_measure", costs_nothing)
    memory = MEMORY if backend == "native" else 2 * MEMORY
    llm = LLM(tiny_path, max_model_len=64, kv_cache_memory=memory, preemption=preemption, **options)
    monkeypatch.setattr(os, function, fails)
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == expected
    assert len(calls) > good_calls
    said = [r.message for r in caplog.records if "a block cannot be" in r.message]
    assert len(said) == 1 and "Input/output error" in said[0]
    # the engine goes on
    assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS)] == expected


def test_a_slot_that_was_not_saved_is_not_loaded_until_it_is_saved_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend, spec = get_backend("reference"), KVSpec(1, 4, 4, "f32", "f32")
    layout = build_layout([spec], [backend.kv_token_bytes(spec)], 2)
    storage = KVStorage(backend, layout, num_blocks=2, num_slots=2)
    storage.layers[0].store.k[:] = 7
    save, load = BlockOp("save", 0, 1), BlockOp("load", 1, 1)
    storage.run([save])
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", _full_disk)
        storage.run([save])
    assert not storage.saving_works() and storage.seconds_per_block() == math.inf
    with pytest.raises(LostBlocksError, match="block 1 was never saved"):
        storage.run([load])
    storage.layers[0].store.k[2:] = 0
    storage.run([save, load])
    assert (storage.layers[0].store.k[:4] == 7).all()


def test_auto_saves_nothing_where_temporary_files_lie_in_memory(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pellucid.kv.storage.lies_in_memory", lambda folder: True)
    llm = LLM(tiny_path, max_model_len=64, kv_cache_memory=MEMORY)
    llm.generate(PROMPTS, PARAMS)
    assert "is memory too" in caplog.text
    assert llm.stats().num_loaded_blocks == 0
