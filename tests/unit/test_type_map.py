"""Type maps against llama-quantize's, and the rules and errors of a user's own."""

import json
from pathlib import Path

import pytest

from pellucid.errors import ConfigError, FormatError
from pellucid.formats.tensor import TensorSpec
from pellucid.quant.type_map import (
    FILE_TYPES,
    choose_formats,
    find_file_type,
    in_file_order,
    is_quantizable,
    read_rules,
)

from .quantize_tensors import map_digest
from .type_map_models import MODELS

GOLDEN = json.loads(
    (Path(__file__).parents[1] / "golden" / "quantize" / "type_maps.json").read_text()
)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("file_type", FILE_TYPES)
def test_formats_are_those_of_llama_quantize(model: str, file_type: str) -> None:
    described = MODELS[model]
    found = [
        map_digest(
            choose_formats(
                FILE_TYPES[file_type],
                described.tensors(),
                described.facts,
                has_importance=has_importance,
            )
        )
        for has_importance in (False, True)
    ]
    assert found == GOLDEN[model][file_type]


def test_tensors_are_ordered_by_layer_and_name() -> None:
    names = ["blk.10.a.weight", "blk.2.b.weight", "output.weight", "blk.2.a.weight", "a.bias"]
    assert in_file_order(names) == [
        *("a.bias", "output.weight", "blk.2.a.weight", "blk.2.b.weight", "blk.10.a.weight")
    ]


@pytest.mark.parametrize(
    ("name", "shape", "quantizable"),
    [
        ("blk.0.attn_q.weight", (8, 256), True),
        ("blk.0.attn_q.weight", (1, 256), False),  # one row is a vector for ggml
        ("blk.0.attn_q.bias", (256,), False),
        ("blk.0.attn_norm.weight", (256,), False),
        ("blk.0.attn_q_norm.weight", (8, 256), False),
        ("position_embd.weight", (8, 256), False),
        ("token_embd.weight", (8, 256), True),
        ("rope_freqs.weight", (32,), False),
    ],
)
def test_only_matrices_of_weights_are_quantized(
    name: str, shape: tuple[int, ...], quantizable: bool
) -> None:
    assert is_quantizable(name, shape) == quantizable


def test_types_are_found_in_any_case_and_by_their_short_names() -> None:
    assert find_file_type("Q4_K_M").name == "q4_k_m"
    assert find_file_type("Q5_K").name == "q5_k_m"
    with pytest.raises(
        ConfigError, match=r"type is 'q4km' \(did you mean q4_k_m\?\); there are f32"
    ):
        find_file_type("q4km")
    with pytest.raises(ConfigError, match="type is 'zzz'; there are f32"):
        find_file_type("zzz")


def test_the_first_rule_that_finds_a_tensor_decides(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("# mine\nblk\\.1\\..*=q8_0 ffn_=Q3_K\n\ntoken_embd=f16\n")
    described = MODELS["small"]
    found = choose_formats(
        find_file_type("q4_k_s"), described.tensors(), described.facts, rules=read_rules(path)
    )
    assert found["token_embd.weight"] == "F16"
    assert found["blk.1.ffn_up.weight"] == "Q8_0"
    assert found["blk.1.attn_norm.weight"] == "F32"
    assert found["blk.2.ffn_up.weight"] == "Q3_K"
    assert found["blk.2.attn_q.weight"] == "Q4_K"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ffn_down", "line 1: 'ffn_down' is not of the form PATTERN=FORMAT"),
        ("\nffn_down=", "line 2: 'ffn_down=' is not of the form PATTERN=FORMAT"),
        ("ffn_down=q9", "line 1: format is 'q9'"),
        ("ffn_down=q4_k_m", r"format is 'q4_k_m' \(did you mean Q4_K\?\); there are F32, F16"),
        ("(=q4_k", r"'\(' is not a regular expression"),
    ],
)
def test_a_wrong_rule_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "map.txt"
    path.write_text(text)
    with pytest.raises((ConfigError, FormatError), match=message):
        read_rules(path)


def test_a_rule_whose_format_does_not_fit_the_width_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.txt"
    path.write_text("attn_q=q4_k")
    described = MODELS["narrow"]
    with pytest.raises(
        ConfigError,
        match=r"tensor 'blk\.0\.attn_q\.weight' the format Q4_K, whose blocks hold 256 values; its "
        "rows have 288, which fit F32, F16",
    ):
        choose_formats(
            find_file_type("q8_0"), described.tensors(), described.facts, rules=read_rules(path)
        )


def test_a_tensor_that_must_not_be_quantized_keeps_its_format() -> None:
    tensors = {
        "token_embd.weight": TensorSpec("F16", (2, 256)),
        "output_norm.weight": TensorSpec("F16", (256,)),
    }
    found = choose_formats(find_file_type("q4_0"), tensors, MODELS["small"].facts)
    assert found == {"output_norm.weight": "F16", "token_embd.weight": "Q6_K"}
