"""Keywords of `LLM`: those of the engine, those of its backend, and what is said about others."""

from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, EngineConfig
from pellucid.checks import declarations
from pellucid.engine.options import ELSEWHERE, build_engine_config
from pellucid.errors import ConfigError


def test_options_of_the_backend_go_to_it_and_the_others_to_the_engine() -> None:
    assert build_engine_config({"threads": 2, "block_size": 8}) == EngineConfig(
        block_size=8, backend_options={"threads": 2}
    )
    both = build_engine_config({"threads": 2, "backend_options": {"isa": "portable"}})
    assert both.backend_options == {"threads": 2, "isa": "portable"}
    assert build_engine_config({}) == EngineConfig()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"max_num_seq": 4}, r"there is no option 'max_num_seq'; did you mean 'max_num_seqs'\?"),
        ({"n_threads": 4}, r"there is no option 'n_threads'; did you mean 'threads'\?"),
        ({"dtype": "auto"}, r"there is no option 'dtype': weights keep the format of their file;"),
        ({"tensor_parallel_size": 2}, r"'tensor_parallel_size': one process computes the whole"),
        ({"gpu_memory_utilization": 0.9}, r"kv_cache_memory, as a share below 1"),
        ({"xyzzy": 1}, r"there is no option 'xyzzy'; the names are: backend, backend_options, "),
        ({"threads": 2, "backend": "reference"}, r"'threads': it is an option of the native"),
        ({"threads": 2, "backend": "gpu"}, r"backend is 'gpu'; it must be one of: native"),
        ({"threads": 2, "backend": 5}, r"^backend is 5; it must be a string"),
        ({"threads": 2, "backend_options": 5}, r"^backend_options is 5; it must be a mapping"),
    ],
)
def test_any_other_name_is_answered_with_the_nearest_and_all_of_them(
    options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        build_engine_config(options)


@pytest.mark.parametrize("threads", ["4", 0, 1.5, True, 257])
def test_options_of_the_backend_are_checked_by_their_declarations(
    tiny_path: Path, threads: Any
) -> None:
    with pytest.raises(ConfigError, match=r"^threads is .*; it must be an integer between 1 and"):
        LLM(tiny_path, threads=threads)


def test_no_name_said_to_be_elsewhere_is_an_option() -> None:
    own = {told.name for told in declarations(EngineConfig)}
    assert not own & set(ELSEWHERE)
    for name in ELSEWHERE:
        with pytest.raises(ConfigError, match=f"no option '{name}': "):
            build_engine_config({name: 1})
