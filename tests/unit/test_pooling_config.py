"""How a model's authors pool its embeddings, as files say it."""

import json
from pathlib import Path
from typing import Any

import pytest

from pellucid import PoolingParams
from pellucid.engine.pooling import resolve_pooling
from pellucid.errors import ConfigError, FormatError
from pellucid.weights.pooling_config import read_pooling


def header(value: Any) -> dict[str, object]:
    return {"general.architecture": "qwen3", "qwen3.pooling_type": value}


@pytest.mark.parametrize(
    ("number", "name"), [(0, None), (1, "mean"), (2, "cls"), (3, "last"), (4, "rank")]
)
def test_a_gguf_file_has_llama_cpps_number(number: int, name: str | None) -> None:
    assert read_pooling(header(number)) == name


def test_a_file_may_say_nothing_and_nothing_wrong(tmp_path: Path) -> None:
    assert read_pooling({"general.architecture": "llama"}) is None
    assert read_pooling(tmp_path) is None
    for value, said in ((5, "pooling_type is 5"), (-1, "pooling_type is -1"), ("last", "'last'")):
        with pytest.raises(FormatError, match=said):
            read_pooling(header(value))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "word_embedding_dimension": 8}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "mean+cls"),
        ({}, None),
    ],
)
def test_a_folder_has_sentence_transformers_flags(
    tmp_path: Path, flags: dict[str, Any], name: str | None
) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    assert read_pooling(tmp_path) == name


def test_a_flag_of_a_wrong_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": "yes"}')
    with pytest.raises(FormatError, match="pooling_mode_lasttoken"):
        read_pooling(tmp_path)


def test_a_request_goes_before_the_file_and_the_file_before_the_last_token() -> None:
    assert resolve_pooling(PoolingParams(), None).pooling == "last"
    assert resolve_pooling(PoolingParams(), "mean").pooling == "mean"
    assert resolve_pooling(PoolingParams(pooling="last"), "cls").pooling == "last"
    with pytest.raises(ConfigError, match="own is 'cls', which is not supported"):
        resolve_pooling(PoolingParams(), "cls")
