"""Folders quantized by GPTQ, AWQ and compressed-tensors (tests/golden/quantized): read without
rounding, and run.

The reference backend is held to the logits that transformers computed with the weights that each
library itself unpacks. Changed copies of the folders are refused in one sentence.
"""

import json
import random
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from pellucid.backends.native.capture import capture
from pellucid.cli.inspect import inspect
from pellucid.cli.plan import plan
from pellucid.errors import FormatError, PellucidError, UnsupportedError
from pellucid.formats.packing import gptq_words, gptq_zero_words
from pellucid.formats.tensor import HostTensor
from pellucid.kv_spec import build_kv_specs
from pellucid.models.registry import get_graph
from pellucid.ops.protocol import KVLayer
from pellucid.weights.checkpoint import open_checkpoint

from .harness import (
    GOLDEN,
    NATIVE_BUDGET,
    Chunk,
    Loaded,
    Session,
    check_close,
    load,
    round_as_native,
)

QUANTIZED = Path(__file__).parents[1] / "golden" / "quantized"
NAMES = sorted(folder.name for folder in QUANTIZED.iterdir() if folder.is_dir())
LAYER = "model.layers.0.mlp.down_proj"
Change = Callable[[dict[str, Any]], object]

# the format of the down projection, of 96 inputs, in each folder
FORMATS = {
    "awq-int4-g32": "UINT4_G32",
    "compressed-w3a16": "UINT3_G32",
    "compressed-w4a16": "INT4_G32",
    "compressed-w4a16-asym": "UINT4_G32",
    "compressed-w8a16": "INT8_G32",
    "compressed-w8a8": "INT8_ROW",
    "gptq-int2-g64": "UINT2_G32",
    "gptq-int3-g32-v2": "UINT3_G32",
    "gptq-int4-g32": "INT4_G32",
    "gptq-int4-g32-actorder": "UINT4_G32",
    "gptq-int8-rows": "INT8_G32",
}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(name, config=…, tensors=…) -> a changed copy of that folder."""

    def copy(
        name: str, *, config: Change = lambda c: None, tensors: Change = lambda t: None
    ) -> Path:
        path = Path(shutil.copytree(QUANTIZED / name, tmp_path / name))
        values = json.loads((path / "config.json").read_text())
        config(values)
        (path / "config.json").write_text(json.dumps(values))
        arrays = load_file(path / "model.safetensors")
        tensors(arrays)
        save_file(
            {n: np.ascontiguousarray(a) for n, a in arrays.items()}, path / "model.safetensors"
        )
        return path

    return copy


@pytest.fixture
def run() -> Callable[..., str]:
    """run(command, *arguments, code=0) -> what it prints."""

    def invoke(command: click.Command, *arguments: str, code: int = 0) -> str:
        result = CliRunner().invoke(command, arguments)
        if isinstance(result.exception, PellucidError):
            assert code
            return str(result.exception)
        assert result.exit_code == code, result.output
        return result.output

    return invoke


def expected(name: str) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    with np.load(QUANTIZED / name / "expected.npz") as file:
        return file["input_ids"], file["logits"]


def read_all(path: Path) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        return dict(checkpoint.parameters())


def test_every_folder_is_listed() -> None:
    assert list(FORMATS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_library(name: str) -> None:
    input_ids, logits = expected(name)
    check_close(Session(load(QUANTIZED / name, "reference")).prefill(input_ids), logits)


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_knows_formats_without_reading(name: str) -> None:
    with open_checkpoint(QUANTIZED / name) as checkpoint:
        specs = checkpoint.specs()
        assert specs["layers.0.down_proj.weight"].format == FORMATS[name]
        for parameter, tensor in checkpoint.parameters():
            assert tensor.spec == specs[parameter]


def test_act_order_is_kept_as_an_order_of_inputs() -> None:
    tensor = read_all(QUANTIZED / "gptq-int4-g32-actorder")["layers.0.down_proj.weight"]
    assert tensor.input_order is not None
    assert sorted(tensor.input_order.tolist()) == list(range(96))


def test_a_natural_g_idx_is_no_order(folder: Callable[..., Path]) -> None:
    tensor = read_all(QUANTIZED / "gptq-int4-g32")["layers.0.down_proj.weight"]
    assert tensor.input_order is None
    # a folder without it is the same
    without = folder("gptq-int4-g32", tensors=lambda t: t.pop(f"{LAYER}.g_idx"))
    assert np.array_equal(read_all(without)["layers.0.down_proj.weight"].data, tensor.data)


def test_an_older_folder_says_it_in_quantize_config_json(folder: Callable[..., Path]) -> None:
    found: dict[str, Any] = {}
    path = folder("gptq-int4-g32", config=lambda c: found.update(c.pop("quantization_config")))
    del found["quant_method"]
    (path / "quantize_config.json").write_text(json.dumps(found))
    assert read_all(path)["layers.0.down_proj.weight"].format == "INT4_G32"


def test_biases_of_zeros_beside_packed_matrices_are_ignored(folder: Callable[..., Path]) -> None:
    path = folder(
        "gptq-int4-g32", tensors=lambda t: t.update({f"{LAYER}.bias": np.zeros(64, np.float16)})
    )
    assert "layers.0.down_proj.bias" not in read_all(path)


def test_a_bias_that_the_model_lacks_is_refused(folder: Callable[..., Path]) -> None:
    path = folder(
        "gptq-int4-g32", tensors=lambda t: t.update({f"{LAYER}.bias": np.ones(64, np.float16)})
    )
    with pytest.raises(FormatError, match=r"down_proj\.bias"):
        open_checkpoint(path)


def test_modules_that_are_not_quantized_are_read_as_they_are(folder: Callable[..., Path]) -> None:
    """The tensors say it, so lists of modules need not be evaluated."""

    def unpack(t: dict[str, Any]) -> None:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del t[f"{LAYER}.{part}"]
        t[f"{LAYER}.weight"] = np.ones((64, 96), np.float16)

    tensors = read_all(folder("gptq-int4-g32", tensors=unpack))
    assert tensors["layers.0.down_proj.weight"].format == "F16"
    assert tensors["layers.1.down_proj.weight"].format == "INT4_G32"


def quantization(**fields: Any) -> Change:
    return lambda config: config["quantization_config"].update(fields)


def arguments(part: str, **fields: Any) -> Change:
    def change(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"][part].update(fields)

    return change


REFUSED_CONFIGS: list[tuple[str, Change, str]] = [
    ("gptq-int4-g32", quantization(quant_method="bitsandbytes"), "'bitsandbytes'.*methods that"),
    ("gptq-int4-g32", quantization(quant_method="fp8"), "'fp8', which is not supported"),
    ("gptq-int4-g32", quantization(checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
    ("gptq-int4-g32", quantization(is_marlin_format=True), "'marlin', which is not supported"),
    ("gptq-int4-g32", quantization(bits=5), "bits is 5; it must be one of: 2, 3, 4, 8"),
    ("gptq-int4-g32", quantization(bits="four"), "bits is 'four'; it must be an integer"),
    ("gptq-int4-g32", quantization(group_size=0), "group_size is 0; it must be -1 or at least 1"),
    ("gptq-int4-g32", quantization(pack_dtype="int64"), "pack_dtype is 'int64'"),
    ("awq-int4-g32", quantization(version="gemv"), "version is 'gemv'.*gemm"),
    ("awq-int4-g32", quantization(backend="llm-awq"), "version is 'llm-awq'"),
    ("compressed-w4a16", quantization(format="marlin-24"), "format is 'marlin-24'"),
    ("compressed-w4a16", quantization(format="float-quantized"), "format is 'float-quantized'"),
    ("compressed-w4a16", quantization(config_groups={}), "config_groups is missing, or not"),
    ("compressed-w4a16", quantization(config_groups={"a": {}}), "a is a group without weights"),
    ("compressed-w4a16", quantization(kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is set"),
    ("compressed-w4a16", quantization(sparsity_config={"format": "sparse-24"}), "'sparse-24'"),
    ("compressed-w4a16", arguments("weights", type="float"), "type is 'float'"),
    ("compressed-w4a16", arguments("weights", num_bits=6), "num_bits is 6"),
    ("compressed-w4a16", arguments("weights", strategy="block"), "strategy is 'block'"),
    ("compressed-w4a16", arguments("weights", rotation="x"), "the field 'rotation' is not known"),
    ("compressed-w8a8", arguments("input_activations", dynamic=False), "dynamic is false"),
    ("compressed-w8a8", arguments("input_activations", num_bits=4), "num_bits is 4"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED_CONFIGS)
def test_what_cannot_be_read_is_refused_by_its_field(
    folder: Callable[..., Path], name: str, change: Change, message: str
) -> None:
    with pytest.raises(PellucidError, match=message) as caught:
        open_checkpoint(folder(name, config=change))
    assert isinstance(caught.value, FormatError | UnsupportedError)


def put(part: str, value: Callable[[NDArray[Any]], Any]) -> Change:
    def change(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.{part}"] = value(tensors[f"{LAYER}.{part}"])

    return change


def with_value(index: tuple[int, ...], value: Any) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(array: NDArray[Any]) -> NDArray[Any]:
        changed = array.copy()
        changed[index] = value
        return changed

    return change


REFUSED_TENSORS: list[tuple[str, Change, str]] = [
    ("gptq-int4-g32", put("qweight", lambda a: a[:-1]), r"qweight' has shape \[11, 64\].*12, 64"),
    ("gptq-int4-g32", put("scales", lambda a: a[:-1]), r"scales' has shape \[2, 64\].*3, 64"),
    ("gptq-int4-g32", put("qzeros", lambda a: a.T), r"qzeros' has shape \[8, 3\]"),
    ("gptq-int4-g32", put("scales", lambda a: a.astype(np.int32)), "scales is of type I32"),
    ("gptq-int4-g32", put("qweight", lambda a: a.view(np.float32)), "qweight is of type F32"),
    ("gptq-int4-g32", lambda t: t.pop(f"{LAYER}.qzeros"), "lacks the tensor.*qzeros"),
    ("gptq-int4-g32", put("scales", with_value((0, 5), np.nan)), "scales hold NaN or infinity"),
    ("awq-int4-g32", put("scales", with_value((0, 5), np.inf)), "scales hold NaN or infinity"),
    ("compressed-w8a8", put("weight_scale", with_value((5, 0), np.nan)), "scales hold NaN"),
    ("gptq-int4-g32", put("qzeros", lambda a: a + 1), "zero point of 9; .* all are 8"),
    ("gptq-int4-g32-actorder", put("g_idx", with_value((0,), 7)), "32 inputs into each of 3"),
    ("gptq-int4-g32-actorder", put("g_idx", with_value((0,), -1)), "32 inputs into each of 3"),
    ("compressed-w4a16", put("weight_shape", lambda a: a[::-1]), r"weight_shape is \[96, 64\]"),
    ("compressed-w4a16", put("weight_packed", lambda a: a[:, :-1]), "weight_packed' has shape"),
    ("compressed-w4a16-asym", put("weight_zero_point", lambda a: a[:-1]), "has shape"),
    ("compressed-w8a8", put("weight", lambda a: a.T), r"weight' has shape \[96, 64\]"),
]


WRONG: list[Any] = [None, True, False, 0, -1, 5, 1.5, 1e308, 1 << 63, 1 << 200, "", "x", "4"]
WRONG += [[], [None], {}, ["a", 5], {"a": 1}, {"": {}}, [[[]]], "(" * 50]


def places_in(value: Any) -> list[tuple[Any, ...]]:
    """The keys that lead to each value inside."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    found: list[tuple[Any, ...]] = []
    for key, inner in pairs:
        found.append((key,))
        if isinstance(inner, dict | list):
            found += [(key, *rest) for rest in places_in(inner)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_any_value_in_the_config_is_read_or_refused_in_one_sentence(
    name: str, folder: Callable[..., Path]
) -> None:
    path, chance = folder(name), random.Random(name)
    original = json.loads((path / "config.json").read_text())
    for _ in range(60):
        config = json.loads(json.dumps(original))
        inner = config["quantization_config"]
        *outer, last = chance.choice(places_in(inner))
        for key in outer:
            inner = inner[key]
        inner[last] = chance.choice(WRONG)
        (path / "config.json").write_text(json.dumps(config))
        try:
            with open_checkpoint(path) as checkpoint:
                assert dict(checkpoint.parameters())
        except PellucidError as error:
            assert len(str(error)) < 500 and "\n" not in str(error)


@pytest.mark.parametrize(
    ("name", "config", "field"),
    [
        ("awq-int4-g32", {"zero_point": "x"}, "zero_point is 'x'; it must be true or false"),
        ("awq-int4-g32", {"modules_to_not_convert": 1.5}, "modules_to_not_convert is 1.5; it must"),
        ("compressed-w4a16", {"ignore": ["lm_head", 5]}, "ignore is .*; it must be a list of str"),
    ],
)
def test_fields_that_are_not_used_have_their_types(
    name: str, config: dict[str, Any], field: str, folder: Callable[..., Path]
) -> None:
    path = folder(name, config=lambda values: values["quantization_config"].update(config))
    with pytest.raises(FormatError, match=field):
        open_checkpoint(path)


@pytest.mark.parametrize(("name", "change", "message"), REFUSED_TENSORS)
def test_damaged_parts_are_refused_by_their_names(
    folder: Callable[..., Path], name: str, change: Change, message: str
) -> None:
    path = folder(name, tensors=change)
    with pytest.raises(PellucidError, match=message) as caught:
        read_all(path)
    assert isinstance(caught.value, FormatError | UnsupportedError)
    assert "down_proj" in str(caught.value) and "\n" not in str(caught.value)


def round_in_order(loaded: Loaded, tensors: Mapping[str, HostTensor]) -> Callable[[Any], Any]:
    """The reference's ops with the roundings of the native backend: inputs of products to 8 bits,
    in blocks of 32 in the order in which the weight has them, or in W8A8 by rows.
    """
    orders = {
        id(loaded.weights[name]): tensor.input_order
        for name, tensor in tensors.items()
        if tensor.input_order is not None
    }
    quantized = {id(loaded.weights[n]) for n, t in tensors.items() if "INT" in t.format}
    by_rows = {id(loaded.weights[n]) for n, t in tensors.items() if t.format == "INT8_ROW"}

    def change(ops: Any) -> Any:
        changed, plain = round_as_native(ops, activations=True), round_as_native(ops)

        def linear(x: NDArray[np.float32], weight: Any, bias: Any = None) -> Any:
            if id(weight) not in quantized:
                return plain.linear(x, weight, bias)
            if id(weight) in by_rows:
                largest = np.abs(x).max(axis=-1, keepdims=True)
                codes = np.rint(x * (np.float32(127) / largest))
                return plain.linear(codes * (largest / np.float32(127)), weight, bias)
            order = orders.get(id(weight))
            if order is None:
                return changed.linear(x, weight, bias)
            return changed.linear(x[:, order], weight[:, order], bias)

        return SimpleNamespace(**{**vars(changed), "linear": linear})

    return change


@pytest.mark.parametrize("name", NAMES)
def test_the_native_backend_agrees_with_the_reference(name: str) -> None:
    """It rounds activations to 8 bits and keys and values to float16; with the same roundings, the
    reference gives the same logits. Where a number lies in the middle between two 8-bit codes, that
    token and those after it differ: so the first tokens are compared closely, and all loosely.
    """
    input_ids, logits = expected(name)
    reference, tensors = load(QUANTIZED / name, "reference"), read_all(QUANTIZED / name)
    rounded = Session(reference, change_ops=round_in_order(reference, tensors)).prefill(input_ids)
    native = Session(load(QUANTIZED / name, "native"))
    actual = native.prefill(input_ids)
    errors = np.abs(actual - rounded).max(axis=1) / np.abs(rounded).max()
    assert errors[:4].max() <= NATIVE_BUDGET and errors.max() <= 0.05, errors
    check_close(actual, logits, 0.1)
    # a token alone has the same bits
    blocks = native.take_blocks(len(input_ids))
    for start in range(0, len(input_ids), 13):
        found = native.run([Chunk(input_ids[start : start + 13], start, blocks)])
        assert np.array_equal(found, actual[start : start + 13])


def test_weights_of_one_order_share_their_activations() -> None:
    """q, k and v; gate and up. Weights of other inputs are quantized apart."""
    loaded = load(QUANTIZED / "gptq-int4-g32-actorder", "native")
    names = [f"layers.0.{module}_proj.weight" for module in ("q", "k", "v", "o", "down")]
    orders = [loaded.weights[name].order for name in names]
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 4 * 64
    assert len(orders[4]) == 4 * 96
    graph = get_graph(loaded.config.graph)
    layers = [
        KVLayer(loaded.backend.new_kv_store(4, 16, spec))
        for spec in build_kv_specs(loaded.config, "f16", "f16")
    ]
    entries = capture(
        lambda ops, batch: graph.forward(ops, loaded.config, loaded.weights, batch, layers)
    ).entries
    of_layers = [e for e in entries if e.op == "quantize" and e.weight is not None]
    assert len(of_layers) == 2 * 4


def test_inspect_shows_each_matrix_as_one(run: Callable[..., Any]) -> None:
    shown = run(inspect, str(QUANTIZED / "gptq-int4-g32"))
    assert "(safetensors, gptq)" in shown
    assert re.search(r"INT4_G32 +14 +61,440 +39\.4 kB +5\.12", shown)
    assert "qweight" not in run(inspect, str(QUANTIZED / "gptq-int4-g32"), "--tensors")


def test_plan_counts_the_bytes_of_packed_matrices(run: Callable[..., Any], tmp_path: Path) -> None:
    """From the tensors, and from config.json alone."""
    shown = run(plan, str(QUANTIZED / "awq-int4-g32"), "--hardware", "h100")
    assert re.search(r"mlp +36,864 +UINT4_G32 +24\.2 kB", shown)
    config = json.loads((QUANTIZED / "awq-int4-g32" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    alone = run(plan, str(tmp_path), "--hardware", "h100")
    assert re.search(r"mlp +36,864 +UINT4_G32 +24\.2 kB", alone)


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8", "marlin"])
def test_inspect_and_plan_say_which_methods_run(
    method: str, run: Callable[..., Any], folder: Callable[..., Path]
) -> None:
    path = folder("gptq-int4-g32", config=quantization(quant_method=method))
    sentence = f"weights are quantized by {method!r}, which is not supported"
    assert sentence in run(inspect, str(path)).replace("\n" + " " * 15, " ")
    assert sentence in run(plan, str(path), "--hardware", "h100", code=1)


def pack_by_gptq(
    weight: NDArray[np.float32], group_size: int, order: NDArray[np.int64] | None
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """Parts of a matrix [out, in], and what they are."""
    inputs = weight.shape[1]
    group = np.arange(inputs) // group_size
    if order is not None:
        group = group[order]
    groups = int(group.max()) + 1
    scales = np.stack([np.abs(weight[:, group == g]).max(axis=1) / 7 for g in range(groups)], 1)
    scales = scales.astype(np.float16).astype(np.float32)
    codes = np.clip(np.rint(weight / scales[:, group]) + 8, 0, 15)
    zeros = np.full(scales.shape, 8, np.uint8)
    parts: dict[str, NDArray[Any]] = {
        "qweight": gptq_words(codes.astype(np.uint8), 4),
        "qzeros": gptq_zero_words(zeros, 4, minus_one=True),
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        "g_idx": group.astype(np.int32),
    }
    values: NDArray[np.float32] = scales[:, group] * (codes.astype(np.float32) - np.float32(8))
    return parts, values


@pytest.mark.parametrize("group_size", [32, 16])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", ["phi3", "gpt2", "qwen2"])
def test_fused_and_transposed_matrices_are_packed_too(
    name: str, act_order: bool, group_size: int, tmp_path: Path
) -> None:
    """Groups of 16 inputs have no tiles: such a matrix is decoded. GPT-2's Conv1D is packed as a
    linear layer.
    """
    rng = np.random.default_rng(0)
    packed: dict[str, NDArray[Any]] = {}
    plain: dict[str, NDArray[Any]] = {}
    for file in sorted((GOLDEN / name).glob("*.safetensors")):
        for tensor, value in load_file(file).items():
            module = tensor.removesuffix(".weight")
            is_linear = value.ndim == 2 and (".layers." in tensor or ".h." in tensor)
            conv1d = name == "gpt2"
            if not is_linear or (value.shape[0] if conv1d else value.shape[1]) % 32:
                packed[tensor] = plain[tensor] = value
                continue
            weight = value.astype(np.float32).T if conv1d else value.astype(np.float32)
            order = rng.permutation(weight.shape[1]) if act_order else None
            parts, values = pack_by_gptq(weight, group_size, order)
            packed |= {f"{module}.{part}": array for part, array in parts.items()}
            plain[tensor] = np.ascontiguousarray(values.T if conv1d else values)
    config = json.loads((GOLDEN / name / "config.json").read_text())
    method = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True}
    logits = []
    for at, tensors, extra in (
        ("plain", plain, {}),
        ("packed", packed, {"quantization_config": {**method, "desc_act": act_order}}),
    ):
        (tmp_path / at).mkdir()
        (tmp_path / at / "config.json").write_text(json.dumps({**config, **extra}))
        save_file(tensors, tmp_path / at / "model.safetensors")
        ids = np.arange(20, dtype=np.int32)
        logits.append(Session(load(tmp_path / at, "reference")).prefill(ids))
    assert np.array_equal(logits[0], logits[1])
    formats = {t.format for t in read_all(tmp_path / "packed").values()}
    assert ("INT4_G32" in formats) == (group_size == 32)
