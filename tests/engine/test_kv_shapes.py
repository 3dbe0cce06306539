"""Layers whose keys and values differ in number, width and window share one engine: nothing assumes
that all layers are alike.
"""

from collections.abc import Sequence

import numpy as np
import pytest

from pellucid.backends.reference.backend import ReferenceBackend
from pellucid.batch import ForwardBatch
from pellucid.engine.model_runner import ModelRunner
from pellucid.formats import encode_dense
from pellucid.kv.layout import build_layout
from pellucid.kv.manager import KVCacheManager
from pellucid.kv.storage import KVStorage
from pellucid.kv_spec import KVSpec
from pellucid.ops.protocol import Ops, Tensor
from pellucid.request import Request
from pellucid.sampling_params import SamplingParams
from pellucid.scheduler import Scheduler

VOCAB, HIDDEN, HEADS, BLOCK, CHUNK = 13, 24, 4, 4, 6
SPECS = (
    KVSpec(num_kv_heads=2, k_dim=8, v_dim=8, k_dtype="f32", v_dtype="f32"),
    KVSpec(num_kv_heads=1, k_dim=16, v_dim=4, k_dtype="f32", v_dtype="f32", window=7),
    KVSpec(num_kv_heads=4, k_dim=4, v_dim=12, k_dtype="f32", v_dtype="f16"),
)
PROMPTS = [[i % VOCAB for i in range(n, 3 * n)] for n in (5, 9, 14)]


class Engine:
    """A toy model of one attention per spec, with a scheduler and a cache of `num_blocks`."""

    def __init__(self, specs: Sequence[KVSpec], num_blocks: int, num_slots: int = 0) -> None:
        backend, rng = ReferenceBackend(), np.random.default_rng(0)

        def weight(rows: int, columns: int) -> Tensor:
            matrix = rng.normal(0, columns**-0.5, (rows, columns)).astype(np.float32)
            return backend.load_weight(encode_dense(matrix))

        table = weight(VOCAB, HIDDEN)
        layers = [
            {
                "q": weight(HEADS * spec.k_dim, HIDDEN),
                "k": weight(spec.num_kv_heads * spec.k_dim, HIDDEN),
                "v": weight(spec.num_kv_heads * spec.v_dim, HIDDEN),
                "o": weight(HIDDEN, HEADS * spec.v_dim),
            }
            for spec in specs
        ]
        layout = build_layout(specs, [backend.kv_token_bytes(spec) for spec in specs], BLOCK)
        storage = KVStorage(backend, layout, num_blocks, num_slots)

        def forward(ops: Ops, batch: ForwardBatch) -> Tensor:
            x = ops.embedding(table, batch.input_ids)
            for spec, w, kv in zip(specs, layers, storage.layers, strict=True):
                q = ops.split_heads(ops.linear(x, w["q"]), HEADS)
                k, v = (ops.split_heads(ops.linear(x, w[n]), spec.num_kv_heads) for n in "kv")
                ops.kv_write(kv, k, v, batch.attention.slot_mapping)
                seen = ops.attention(q, kv, batch.attention, scale=1.0, window=spec.window)
                x = ops.add(x, ops.linear(seen, w["o"]))
            return ops.linear(ops.take_rows(x, batch.logits_indices), table)

        self.kv = KVCacheManager(layout, num_blocks, num_slots=num_slots)
        self._scheduler = Scheduler(
            self.kv, max_model_len=48, max_num_batched_tokens=CHUNK, max_num_seqs=3
        )
        self._runner = ModelRunner(backend.build_forward(forward), storage, block_size=BLOCK)

    def run(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        params = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
        requests = [
            Request(
                request_id=str(i),
                prompt_token_ids=list(prompt),
                params=params,
                seed=0,
                max_tokens=12,
            )
            for i, prompt in enumerate(prompts)
        ]
        self._scheduler.add(*requests)
        while self._scheduler.num_unfinished:
            step = self._scheduler.schedule()
            self._scheduler.update(step, self._runner.execute(step).sampled)
            self._scheduler.check_integrity()
        return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("num_slots", [0, 40])
def test_layers_of_different_widths_give_alone_and_crowded_the_same_tokens(num_slots: int) -> None:
    alone = [Engine(SPECS, 30).run([prompt])[0] for prompt in PROMPTS]
    crowded = Engine(SPECS, 13, num_slots)
    assert len({token for tokens in alone for token in tokens}) > 5
    assert crowded.run(PROMPTS) == alone
    assert crowded.run(PROMPTS) == alone  # with what is cached
    assert (crowded.kv.num_loaded_blocks > 0) == (num_slots > 0)
