"""The plan of loading: every declared parameter has its tensors in the file, what the file lacks or
holds beyond them is refused by name, and what is folded is what was meant.
"""

import dataclasses
from typing import get_args

import numpy as np
import pytest
from numpy.typing import NDArray

from pellucid.config import GraphName, ModelConfig, RopeConfig
from pellucid.errors import ConfigError, FormatError, UnsupportedError
from pellucid.formats import HostTensor, dequantize, encode_dense, quantize
from pellucid.formats.tensor import TensorSpec
from pellucid.models.params import Param
from pellucid.models.registry import GRAPHS, get_graph
from pellucid.weights.families import FAMILIES, SourceOf
from pellucid.weights.families.gguf import gguf_source
from pellucid.weights.families.gpt2 import GPT2
from pellucid.weights.families.phi3 import PHI3
from pellucid.weights.folds import AddOne, Fold, InterleavedToHalfSplit, SliceOutputs, Transpose
from pellucid.weights.plan import ParamSource, build_plan, is_ignored, read_plan
from pellucid.weights.scratch import Scratch

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=96,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qkv_bias=True,
    o_bias=True,
    mlp_bias=True,
    qk_norm=True,
    rope=RopeConfig(rotary_dim=8),
)
SOURCES = {f"{family.name}-hf": family.hf.source for family in FAMILIES} | {
    f"{family.name}-gguf": family.gguf.source for family in FAMILIES if family.gguf is not None
}


def config_of(graph: GraphName) -> ModelConfig:
    if graph != "gpt2":
        return dataclasses.replace(CONFIG, graph=graph)
    return dataclasses.replace(
        CONFIG, graph=graph, num_kv_heads=4, qk_norm=False, rope=None, activation="gelu_tanh"
    )


def graph_of(family: str) -> GraphName:
    return "gpt2" if family == "gpt2" else "gemma" if family.startswith("gemma") else "llama"


# how many parameters of a layer lie in a tensor that holds another one already
# GPT-2: q, k and v are one; Phi-3: gate and up too; weights and biases
SHARED = {"gpt2-hf": 4, "gpt2-gguf": 4, "phi3-hf": 6, "phi3-gguf": 6}


@pytest.mark.parametrize("name", SOURCES)
def test_each_parameter_has_a_source_of_its_own_but_where_the_file_fuses_them(name: str) -> None:
    config = config_of(graph_of(name.split("-")[0]))
    tensors = [
        tensor
        for param in get_graph(config.graph).parameters(config)
        for tensor in SOURCES[name](config, param).tensors
    ]
    assert len(tensors) - len(set(tensors)) == SHARED.get(name, 0) * config.num_layers


@pytest.mark.parametrize("graph", GRAPHS)
def test_each_parameter_is_declared_once(graph: GraphName) -> None:
    names = [param.name for param in get_graph(graph).parameters(config_of(graph))]
    assert len(names) == len(set(names))


def test_the_lm_head_is_declared_where_it_is_not_the_embedding() -> None:
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    names, tied_names = ({p.name for p in get_graph("llama").parameters(c)} for c in (CONFIG, tied))
    assert names - tied_names == {"lm_head.weight"}


def test_unknown_graphs_are_refused_with_the_list_of_known_ones() -> None:
    with pytest.raises(ConfigError, match="graph is 'rwkv'; it must be one of: gpt2, llama, gemma"):
        dataclasses.replace(CONFIG, graph="rwkv")  # type: ignore[arg-type]
    assert set(GRAPHS) == set(get_args(GraphName))


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),
        ("transformer.h.11.attn.bias", True),
        ("h.0.attn.masked_bias", True),
        ("blk.3.attn_rot_embd.weight", True),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("h.0.attn.c_attn.bias", False),
        ("blk.0.attn_q.bias", False),
    ],
)
def test_only_buffers_of_old_checkpoints_are_ignored(name: str, ignored: bool) -> None:
    assert is_ignored(name) is ignored


def specs_of(config: ModelConfig, source_of: SourceOf = gguf_source) -> dict[str, TensorSpec]:
    """The table of contents of a file that holds this model in float32."""
    sources = [source_of(config, param) for param in get_graph(config.graph).parameters(config)]
    return {
        name: TensorSpec("F32", shape)
        for source in sources
        for name, shape in source.tensors.items()
    }


def test_a_missing_tensor_is_refused_by_its_name_in_the_file() -> None:
    specs = specs_of(CONFIG)
    del specs["blk.1.ffn_up.weight"]
    with pytest.raises(
        FormatError,
        match=r"x.gguf lacks the tensor 'blk.1.ffn_up.weight' "
        r"\(parameter layers.1.up_proj.weight of llama\)",
    ):
        build_plan(CONFIG, gguf_source, specs, "x.gguf")


def test_an_unexpected_tensor_is_refused_by_its_name() -> None:
    specs = {
        **specs_of(CONFIG),
        "blk.0.ffn_gate_inp.weight": TensorSpec("F32", (8, 32)),
        "blk.1.ffn_gate_inp.weight": TensorSpec("F32", (8, 32)),
    }
    with pytest.raises(
        FormatError,
        match=r"x.gguf holds the tensor 'blk.0.ffn_gate_inp.weight' and 1 more, which llama",
    ):
        build_plan(CONFIG, gguf_source, specs, "x.gguf")


def test_a_misshapen_tensor_is_refused_with_both_shapes() -> None:
    specs = {**specs_of(CONFIG), "blk.0.attn_k.weight": TensorSpec("F32", (32, 32))}
    with pytest.raises(
        FormatError,
        match=r"'blk.0.attn_k.weight' has shape \[32, 32\]; its config implies \[16, 32\]",
    ):
        build_plan(CONFIG, gguf_source, specs, "x.gguf")


def random(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("format", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_rows_are_brought_to_the_half_split_layout_without_being_decoded(format: str) -> None:
    """Interleaved row 2i of a head is its i, row 2i + 1 its i + D/2; on any format the bytes of
    each row stay what they are.
    """
    half_split = quantize(random(2 * 8, 32), format)
    order = [h * 8 + s * 4 + i for h in range(2) for i in range(4) for s in range(2)]
    interleaved = HostTensor(format, half_split.shape, half_split.data[order])
    mended = InterleavedToHalfSplit(2)(interleaved)
    np.testing.assert_array_equal(mended.data, half_split.data)
    assert mended.shape == half_split.shape


def test_biases_are_brought_to_the_half_split_layout_like_rows() -> None:
    mended = InterleavedToHalfSplit(2)(encode_dense(np.arange(8, dtype=np.float32)))
    np.testing.assert_array_equal(dequantize(mended), [0, 2, 1, 3, 4, 6, 5, 7])


def test_outputs_are_cut_out_as_views() -> None:
    weight, bias = quantize(random(96, 32), "Q8_0"), encode_dense(random(96))
    for tensor in (weight, bias):
        part = SliceOutputs(32, 64)(tensor)
        np.testing.assert_array_equal(dequantize(part), dequantize(tensor)[32:64])
        assert np.shares_memory(part.data, tensor.data)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint16])
def test_transposed_columns_are_the_rows(dtype: type) -> None:
    tensor = encode_dense(
        random(32, 96).astype(np.float16).view(np.uint16)
        if dtype is np.uint16
        else random(32, 96).astype(dtype)
    )
    part = Transpose(32, 64)(tensor)
    assert part.shape == (32, 32) and part.format == tensor.format
    np.testing.assert_array_equal(dequantize(part), dequantize(tensor)[:, 32:64].T)
    assert Transpose()(tensor).shape == (96, 32)


def test_only_dense_tensors_are_transposed() -> None:
    with pytest.raises(
        UnsupportedError,
        match="a tensor of format Q8_0 must be split or transposed within its rows",
    ):
        Transpose()(quantize(random(32, 32), "Q8_0"))


def test_gemmas_one_is_added_in_float32() -> None:
    weight = np.array([0.001, -1.0, 300.0], np.float32)
    # bfloat16: 8 bits of it
    stored = encode_dense((weight.view(np.uint32) >> 16).astype(np.uint16))
    assert stored.format == "BF16"
    mended = AddOne()(stored)
    assert mended.format == "F32"
    np.testing.assert_array_equal(dequantize(mended), dequantize(stored) + np.float32(1))


@pytest.mark.parametrize(
    ("fold", "format", "shape"),
    [
        (SliceOutputs(16, 48), "Q4_1", (64, 32)),
        (SliceOutputs(16, 48), "F16", (64,)),
        (InterleavedToHalfSplit(4), "Q8_0", (64, 32)),
        (InterleavedToHalfSplit(4), "F32", (64,)),
        (Transpose(), "F32", (32, 96)),
        (Transpose(32, 64), "BF16", (32, 96)),
        (AddOne(), "BF16", (32,)),
        (AddOne(), "F16", (32,)),
    ],
    ids=str,
)
def test_a_fold_tells_the_format_and_shape_of_what_it_makes(
    fold: Fold, format: str, shape: tuple[int, ...]
) -> None:
    source = quantize(random(*shape), format)
    assert fold.spec(source.spec) == fold(source).spec


def test_a_format_that_cannot_be_folded_is_refused_when_the_plan_is_built() -> None:
    config, reader = config_of("gpt2"), GPT2.gguf
    assert reader is not None
    specs = specs_of(config, reader.source) | {"blk.0.attn_qkv.bias": TensorSpec("Q8_0", (96,))}
    with pytest.raises(
        UnsupportedError, match=r"x.gguf: tensor 'blk.0.attn_qkv.bias': a tensor of format Q8_0"
    ):
        build_plan(config, reader.source, specs, "x.gguf")


class JoinOutputs:
    """The outputs of several weights, one after another."""

    def spec(self, *sources: TensorSpec) -> TensorSpec:
        outputs = sum(source.shape[0] for source in sources)
        return TensorSpec(sources[0].format, (outputs, *sources[0].shape[1:]))

    def __call__(self, *sources: HostTensor) -> HostTensor:
        data = np.concatenate([source.data for source in sources])
        spec = self.spec(*(source.spec for source in sources))
        return HostTensor(spec.format, spec.shape, data)


def test_a_parameter_may_be_made_from_several_tensors() -> None:
    """Such as an embedding that a file holds in two halves."""

    def source_of(config: ModelConfig, param: Param) -> ParamSource:
        if param.name != "embed_tokens.weight":
            return gguf_source(config, param)
        return ParamSource({"low": (64, 32), "high": (32, 32)}, JoinOutputs())

    tensors = {
        name: quantize(random(*spec.shape), "Q8_0" if len(spec.shape) == 2 else "F32")
        for name, spec in specs_of(CONFIG, source_of).items()
    }
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    plan = build_plan(CONFIG, source_of, specs, "x.gguf")
    made = dict(read_plan(plan, lambda name, scratch: tensors[name]))
    assert {planned.name: planned.spec for planned in plan} == {n: t.spec for n, t in made.items()}
    joined = made["embed_tokens.weight"]
    assert joined.spec == TensorSpec("Q8_0", (96, 32))
    np.testing.assert_array_equal(joined.data[:64], tensors["low"].data)
    del specs["high"]
    with pytest.raises(FormatError, match=r"lacks the tensor 'high' \(parameter embed_tokens"):
        build_plan(CONFIG, source_of, specs, "x.gguf")


def test_a_matrix_that_holds_several_parameters_is_read_once() -> None:
    """Phi-3's q, k and v, and its gate and up."""
    config = dataclasses.replace(CONFIG, qkv_bias=False, o_bias=False, mlp_bias=False)
    specs = specs_of(config, PHI3.hf.source)
    read: list[str] = []

    def tensor(name: str, scratch: Scratch) -> HostTensor:
        read.append(name)
        return encode_dense(random(*specs[name].shape))

    plan = build_plan(config, PHI3.hf.source, specs, "folder")
    made = {name: made.spec for name, made in read_plan(plan, tensor)}
    assert made == {planned.name: planned.spec for planned in plan}
    assert sorted(read) == sorted(specs)
