"""`pellucid batch` with a tiny real model: a line is a request, and a line is an answer."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from pellucid import LLM, SamplingParams
from pellucid.cli.main import main


def invoke(folder: Path, lines: list[dict[str, Any] | str], *arguments: str | Path) -> Result:
    path = folder / "requests.jsonl"
    path.write_text(
        "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    )
    return CliRunner().invoke(main, ["batch", str(path), *map(str, arguments)])


def test_answers_are_those_of_generate_whatever_the_order_and_the_options(
    tiny_path: Path, tmp_path: Path
) -> None:
    lines: list[dict[str, Any] | str] = [
        {
            "id": f"r{i}",
            "prompt": "the " * (i + 1),
            "max_tokens": 9 - i,
            "temperature": 1.0,
            "seed": i,
            "tenant": "ab"[i % 2],
        }
        for i in range(6)
    ]
    lines.append(
        {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 3,
            "temperature": 0,
            "n": 2,
            "priority": -1,
        }
    )
    out = tmp_path / "out.jsonl"
    options: list[str | Path] = [
        "--max-num-seqs",
        "3",
        "--scheduling-policy",
        "fair",
        "--batching",
        "static",
        "--kv-cache-memory",
        "64KiB",
        "-o",
        out,
    ]
    result = invoke(tmp_path, lines, "-m", tiny_path, *options)
    assert result.exit_code == 0, result.output
    assert "7 requests in" in result.stderr
    found = {answer["line"]: answer for answer in map(json.loads, out.read_text().splitlines())}
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    llm = LLM(tiny_path)
    for i in range(6):
        expected = llm.generate("the " * (i + 1), SamplingParams(max_tokens=9 - i, seed=i))[
            0
        ].outputs[0]
        assert found[i + 1]["id"] == f"r{i}"
        assert found[i + 1]["outputs"][0]["token_ids"] == expected.token_ids
    assert [o["finish_reason"] for o in found[7]["outputs"]] == ["length", "length"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a"', "line 1: Expecting"),
        ("[1]", "line 1: a request must be a JSON object"),
        ('{"max_tokens": 3}', "line 1: a request needs one of: prompt, prompt_token_ids, messages"),
        (
            '{"prompt": "a", "max_token": 3}',
            "line 1: 'max_token' is neither a field of a request nor of SamplingParams",
        ),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: max_tokens is 0"),
        ('{"prompt": "a", "priority": "high"}', "line 1: priority is 'high'"),
        ("[" * 100_000, "line 1: maximum recursion depth"),
        ("", "holds no request"),
    ],
)
def test_a_line_that_is_no_request_is_named(
    tiny_path: Path, tmp_path: Path, line: str, sentence: str
) -> None:
    result = invoke(tmp_path, [line], "-m", tiny_path)
    assert result.exit_code == 1
    assert sentence in result.output
