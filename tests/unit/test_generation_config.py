"""What a model's files recommend for sampling, in the names of SamplingParams."""

import json
from pathlib import Path
from typing import Any

import pytest

from pellucid import SamplingParams
from pellucid.errors import FormatError
from pellucid.weights.generation_config import read_generation_config


@pytest.mark.parametrize(
    ("said", "found"),
    [
        # Qwen2.5's own
        (
            {
                "bos_token_id": 151643,
                "do_sample": True,
                "eos_token_id": [151645, 151643],
                "repetition_penalty": 1.1,
                "temperature": 0.7,
                "top_p": 0.8,
                "top_k": 20,
                "transformers_version": "4.37.0",
            },
            {"repetition_penalty": 1.1, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        ),
        ({"eos_token_id": 2}, {}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.0}),
        (
            {"do_sample": False, "repetition_penalty": 1.2},
            {"temperature": 0.0, "repetition_penalty": 1.2},
        ),
        ({"top_p": 0.9, "top_k": None}, {"top_p": 0.9, "temperature": 1.0}),
        ({"max_new_tokens": 2048}, {"max_tokens": 2048}),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, {}),
    ],
)
def test_a_folder_recommends_what_its_generation_config_says(
    tmp_path: Path, said: dict[str, Any], found: dict[str, Any]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert read_generation_config(tmp_path) == found
    SamplingParams(**found)


def test_a_folder_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert read_generation_config(tmp_path) == {}


def test_a_gguf_file_recommends_what_its_keys_say() -> None:
    metadata = {
        "general.name": "x",
        "general.sampling.temp": 0.6000000238418579,
        "general.sampling.top_k": 20,
        "general.sampling.top_p": 0.949999988079071,
        "general.sampling.penalty_repeat": 1.0499999523162842,
        "general.sampling.mirostat": 0,
    }
    assert read_generation_config(metadata) == {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
    }
    assert read_generation_config({"general.name": "x"}) == {}


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({"temperature": "warm"}, "temperature is 'warm'; it must be a finite number"),
        ({"top_k": 2.5}, "top_k is 2.5; it must be an integer"),
        ({"do_sample": 1}, "do_sample is 1; it must be true or false"),
    ],
)
def test_a_value_of_a_wrong_type_is_named(
    tmp_path: Path, said: dict[str, Any], sentence: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    with pytest.raises(FormatError, match=sentence):
        read_generation_config(tmp_path)
