"""Moved scales change no output of a model: each golden family in float64, and any shape."""

from collections.abc import Callable, Mapping
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from pellucid.backends.reference import ops as reference
from pellucid.backends.reference.attention import PagedKV
from pellucid.batch import AttentionMetadata, ForwardBatch
from pellucid.config import GraphName, ModelConfig, RopeConfig
from pellucid.kv_spec import build_kv_specs
from pellucid.models.params import Param, split_name
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import KVLayer
from pellucid.quant.calibrate import loader
from pellucid.quant.migration import Migration, find_migrations
from pellucid.weights.checkpoint import open_checkpoint

from .harness import GOLDEN, GOLDEN_NAMES

Doubles = NDArray[np.float64]
Weights = dict[str, NDArray[Any]]


def declared(config: ModelConfig) -> dict[str, Param]:
    return {param.name: param for param in get_graph(config.graph).parameters(config)}


def layer_names(params: Mapping[str, Param], layer: int) -> list[str]:
    return [name for name in params if split_name(name)[0] == layer]


def all_migrations(config: ModelConfig) -> list[Migration]:
    params = declared(config)
    return [
        m for i in range(config.num_layers) for m in find_migrations(params, layer_names(params, i))
    ]


def logits(config: ModelConfig, weights: Weights, input_ids: NDArray[np.int32]) -> Doubles:
    """All logits [T, V] of one request, in float64: weights, keys and values are."""
    n = len(input_ids)
    kv_layers = [
        KVLayer(
            PagedKV(
                np.zeros((n, spec.num_kv_heads, spec.k_dim)),
                np.zeros((n, spec.num_kv_heads, spec.v_dim)),
                n,
            )
        )
        for spec in build_kv_specs(config, "f32", "f32")
    ]
    positions = np.arange(n, dtype=np.int32)
    batch = ForwardBatch(
        input_ids=input_ids,
        positions=positions,
        logits_indices=positions,
        hidden_indices=np.zeros(0, np.int32),
        attention=AttentionMetadata(
            cu_seqlens_q=np.array([0, n], np.int32),
            seq_lens=np.array([n], np.int32),
            block_tables=np.zeros((1, 1, 1), np.int32),
            slot_mapping=positions[None],
            block_size=n,
        ),
    )
    found: Doubles = get_graph(config.graph).forward(reference, config, weights, batch, kv_layers)
    assert found.dtype == np.float64
    return found


def golden(name: str) -> tuple[ModelConfig, Weights, NDArray[np.int32]]:
    with open_checkpoint(GOLDEN / name) as checkpoint:
        config = checkpoint.config
        weights = loader(checkpoint)(declared(config).keys())
    input_ids = np.load(GOLDEN / name / "expected.npz")["input_ids"].astype(np.int32)
    return config, {n: w.astype(np.float64) for n, w in weights.items()}, input_ids


def move_all(config: ModelConfig, weights: Weights, seed: int) -> Weights:
    """All scales of a model moved, from 1/30 to 30."""
    rng = np.random.default_rng(seed)
    for migration in all_migrations(config):
        weights = migration.move(weights, np.exp(rng.uniform(-3.4, 3.4, migration.num_rows)))
    return weights


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_moved_scales_change_no_logit(name: str) -> None:
    config, weights, input_ids = golden(name)
    expected = logits(config, weights, input_ids)
    moved = move_all(config, weights, 0)
    found = logits(config, moved, input_ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
    # the matrices that multiply have changed
    changed = {n for n in weights if not np.array_equal(weights[n], moved[n])}
    grouped = {n for n, p in declared(config).items() if p.group is not None}
    assert changed & grouped == {c for m in all_migrations(config) for c in m.consumers}


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_which_activations_can_be_scaled(name: str) -> None:
    """All that linear layers of the layers read, but for what a GELU alone makes."""
    config, _, _ = golden(name)
    params = declared(config)
    groups = {p.group for p in params.values() if p.group and p.group.startswith("layers.")}
    nonlinear = {g for g in groups if config.graph == "gpt2" and g.endswith("mlp_hidden")}
    assert {m.group for m in all_migrations(config)} == groups - nonlinear
    # and no tensor that is read as it is: embeddings, an lm_head, the norms behind Gemma's sums
    touched = {n for m in all_migrations(config) for n in (*m.producers, *m.consumers)}
    assert not {n for n in touched if split_name(n)[0] is None or "post_" in n}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda m: Migration(m.group, m.producers, m.consumers[1:], m.rows),
        lambda m: Migration(m.group, m.producers[:-1], m.consumers, m.rows),
        lambda m: Migration(m.group, m.producers, m.consumers, np.roll(m.rows, 1)),
    ],
)
@pytest.mark.parametrize("name", ["gpt2", "qwen2"])
def test_a_wrong_migration_is_seen(name: str, spoil: Callable[[Migration], Migration]) -> None:
    """The check above would find a weight that is left out, and a channel that is mixed up."""
    config, weights, input_ids = golden(name)
    expected = logits(config, weights, input_ids)
    rng = np.random.default_rng(1)
    for migration in all_migrations(config)[:2]:
        scales = np.exp(rng.uniform(-2, 2, migration.num_rows))
        found = logits(config, spoil(migration).move(weights, scales), input_ids)
        assert np.abs(found - expected).max() > 1e-6 * np.abs(expected).max()


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    graphs: tuple[GraphName, ...] = ("llama", "gemma", "gpt2")
    graph = draw(st.sampled_from(graphs))
    kv_heads, copies, head_dim = (draw(st.integers(1, 3)), draw(st.integers(1, 4)), 4)
    if graph == "gpt2":
        copies = 1
    bias, layers = draw(st.booleans()), 2
    rope = None if graph == "gpt2" else RopeConfig(rotary_dim=head_dim)
    return ModelConfig(
        architecture="any",
        graph=graph,
        vocab_size=17,
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 11)),
        num_layers=layers,
        num_heads=kv_heads * copies,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=16,
        activation="silu" if graph == "llama" else "gelu_tanh",
        qkv_bias=bias,
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()) and graph != "gpt2",
        tie_word_embeddings=draw(st.booleans()),
        windows=(3, None) if draw(st.booleans()) else (),
        rope=rope,
    )


@settings(max_examples=60, deadline=None)
@given(configs(), st.integers(0, 2**32 - 1))
def test_moved_scales_change_nothing_in_any_shape(config: ModelConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights: Weights = {n: rng.normal(size=p.shape) for n, p in declared(config).items()}
    input_ids = rng.integers(0, config.vocab_size, 9).astype(np.int32)
    expected = logits(config, weights, input_ids)
    found = logits(config, move_all(config, weights, seed), input_ids)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


def test_statistics_of_shared_values_are_those_of_all_their_heads() -> None:
    """Two heads of values, each read by two query heads; a head has 2 dimensions."""
    rows = np.array([0, 1, 0, 1, 2, 3, 2, 3])
    migration = Migration("g", ("v",), ("o",), rows)
    channels = np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32)
    assert migration.largest(channels).tolist() == [3, 4, 7, 8]
    assert migration.mean(channels).tolist() == [2, 3, 6, 7]
    o = np.ones((1, 8), np.float32)
    v = np.ones((4, 3), np.float32)
    moved = migration.move({"v": v, "o": o}, np.array([1, 2, 4, 8], np.float32))
    assert moved["o"].tolist() == [[1, 2, 1, 2, 4, 8, 4, 8]]
    assert moved["v"][:, 0].tolist() == [1, 0.5, 0.25, 0.125]
