"""`pellucid batch` with a tiny real model: a line is a request, and a line is an answer."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import pellucid
from pellucid import LLM, SamplingParams
from pellucid.cli import batch_lines
from pellucid.cli.main import main

Line = dict[str, Any] | str
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(Path(pellucid.__file__).parents[1]))


def write(path: Path, lines: list[Line]) -> Path:
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(text + "\n" for text in texts))
    return path


def invoke(folder: Path, lines: list[Line], *arguments: str | Path) -> Result:
    path = write(folder / "requests.jsonl", lines)
    return CliRunner().invoke(main, ["batch", str(path), *map(str, arguments)])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def texts(records: list[dict[str, Any]]) -> dict[Any, str]:
    return {record["id"]: record["outputs"][0]["text"] for record in records}


def chat_line(name: str, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hi"}]
    url = "/v1/chat/completions"
    return {"custom_id": name, "method": "POST", "url": url, "body": {"messages": messages, **body}}


def text_line(name: str, **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}


def test_answers_are_those_of_generate_whatever_the_order_and_the_options(
    tiny_path: Path, tmp_path: Path
) -> None:
    lines: list[Line] = [
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
    message = {"role": "user", "content": "hi"}
    lines.append({"messages": [message], "max_tokens": 3, "n": 2, "priority": -1})
    out = tmp_path / "out.jsonl"
    options = "--max-num-seqs 3 --scheduling-policy fair --batching static --kv-cache-memory 64KiB"
    result = invoke(tmp_path, lines, "-m", tiny_path, *options.split(), "-o", out)
    assert result.exit_code == 0, result.output
    assert "7 requests in" in result.stderr
    found = {answer["line"]: answer for answer in read(out)}
    assert sorted(found) == [1, 2, 3, 4, 5, 6, 7]
    llm = LLM(tiny_path)
    for i in range(6):
        params = SamplingParams(max_tokens=9 - i, seed=i)
        expected = llm.generate("the " * (i + 1), params)[0].outputs[0]
        assert found[i + 1]["id"] == f"r{i}"
        assert found[i + 1]["outputs"][0]["token_ids"] == expected.token_ids
    assert [o["finish_reason"] for o in found[7]["outputs"]] == ["length", "length"]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"prompt": "a"', "the line is not a JSON object that can be read"),
        ("[1]", "the line holds a list; it must hold a JSON object"),
        ('{"max_tokens": 3}', "a request needs one of: prompt, prompt_token_ids, messages"),
        (
            '{"prompt": "a", "max_token": 3}',
            "'max_token' is neither a field of a request nor of SamplingParams",
        ),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is 0"),
        ('{"prompt": "a", "priority": "high"}', "priority is 'high'"),
        ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias has the key 'x'"),
        ('{"prompt": "a", "logit_bias": {"9999999": 1}}', "9999999"),
        ('{"prompt": 5}', "prompt"),
        ('{"prompt": "' + "x" * 200 + '"}', "96"),
        ('{"prompt_token_ids": [1, 99999]}', "99999"),
        ('{"messages": "hi"}', "messages"),
        ('{"id": [1], "prompt": "a"}', "id is [1]; it must be a string"),
        ('{"prompt": "a", "prompt": "b"}', "an object has a key twice"),
        ('{"id": "good", "prompt": "a"}', "line 1 has the same id 'good'"),
        ("[" * 100_000, "recursion"),
        ('{"prompt": "\\ud800"}', "lone surrogate"),
    ],
)
def test_a_line_that_is_no_request_gets_a_record_and_the_others_are_answered(
    tiny_path: Path, tmp_path: Path, line: str, sentence: str
) -> None:
    good = {"id": "good", "prompt": "a", "max_tokens": 2}
    last = {"id": "last", "prompt": "b", "max_tokens": 2}
    out = tmp_path / "out.jsonl"
    result = invoke(tmp_path, [good, line, "", last], "-m", tiny_path, "-o", out)
    assert result.exit_code == 1
    found = {record["line"]: record for record in read(out)}
    assert sorted(found) == [1, 2, 4] and found[1]["outputs"] and found[4]["outputs"]
    assert sentence in found[2]["error"]
    assert "[line 2: " in result.stderr and "1 failed" in result.stderr


def test_an_empty_file_is_told(tiny_path: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path, [""], "-m", tiny_path)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "holds no request" in result.stderr


def test_a_line_too_long_gets_a_record_and_is_skipped(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINE", 100)
    lines: list[Line] = [{"prompt": "x" * 1000}, {"prompt": "a", "max_tokens": 1}]
    result = invoke(tmp_path, lines, "-m", tiny_path)
    first, second = sorted(map(json.loads, result.stdout.splitlines()), key=lambda r: r["line"])
    assert first["error"] == "the line is longer than 100 bytes" and second["line"] == 2


@pytest.mark.parametrize("link", ["same", "hard", "symbolic"])
def test_answers_never_go_to_the_file_of_the_requests(
    tiny_path: Path, tmp_path: Path, link: str
) -> None:
    source = write(tmp_path / "requests.jsonl", [{"prompt": "a"}])
    before = source.read_bytes()
    out = tmp_path / "requests.jsonl" if link == "same" else tmp_path / "out.jsonl"
    if link == "hard":
        out.hardlink_to(source)
    elif link == "symbolic":
        out.symlink_to(source)
    arguments = ["batch", str(source), "-m", str(tiny_path), "-o", str(out)]
    for extra in ([], ["--overwrite"]):
        result = CliRunner().invoke(main, [*arguments, *extra])
        assert result.exit_code == 1 and "the file of the requests" in result.stderr
        assert source.read_bytes() == before


def test_a_second_run_answers_only_what_is_not_answered(tiny_path: Path, tmp_path: Path) -> None:
    lines: list[Line] = [
        {"id": i, "prompt": "a" * (i + 1), "max_tokens": 3, "temperature": 1} for i in range(5)
    ]
    lines += [{"prompt": "no id", "max_tokens": 3}, chat_line("openai", max_tokens=2)]
    out = tmp_path / "out.jsonl"
    assert invoke(tmp_path, lines, "-m", tiny_path, "-o", out).exit_code == 0
    whole = out.read_bytes()
    # Two answers are lost, and the third that is left is torn
    kept = whole.splitlines(keepends=True)[:4]
    torn = whole.splitlines(keepends=True)[4][:-20]
    out.write_bytes(b"".join(kept) + torn)
    result = invoke(tmp_path, lines, "-m", tiny_path, "-o", out)
    assert result.exit_code == 0, result.output
    assert "3 requests in" in result.stderr and "4 were answered before" in result.stderr
    again = out.read_bytes().splitlines(keepends=True)
    assert again[:4] == kept
    own = [r for r in map(json.loads, again) if "line" in r]
    assert texts(own) == texts([r for r in map(json.loads, whole.splitlines()) if "line" in r])
    # Nothing is left to do, and the model is not even loaded
    result = invoke(tmp_path, lines, "-m", tmp_path / "missing.gguf", "-o", out)
    assert result.exit_code == 0 and "all 7 requests are answered already" in result.stderr
    # --overwrite begins anew
    result = invoke(tmp_path, lines, "-m", tiny_path, "-o", out, "--overwrite")
    assert "7 requests in" in result.stderr and len(read(out)) == 7


def test_requests_that_failed_are_tried_again(tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    long: dict[str, Any] = {"id": "long", "prompt": "x" * 80, "max_tokens": 4}
    good: dict[str, Any] = {"id": "good", "prompt": "x", "max_tokens": 4}
    options = ("-m", tiny_path, "-o", out)
    assert invoke(tmp_path, [long, good], *options, "--max-model-len", "50").exit_code == 1
    assert sum("error" in record for record in read(out)) == 1
    assert invoke(tmp_path, [long, good], *options).exit_code == 0
    assert sorted(texts(read(out))) == ["good", "long"] and len(read(out)) == 2


def test_answers_to_other_requests_are_not_taken_for_these(tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert invoke(tmp_path, [{"prompt": "a"}], "-m", tiny_path, "-o", out).exit_code == 0
    before = out.read_bytes()
    result = invoke(tmp_path, [{"prompt": "b"}], "-m", tiny_path, "-o", out)
    assert result.exit_code == 1 and "the answer to another request under line 1" in result.stderr
    out.write_text("a shopping list\nmilk\n")
    result = invoke(tmp_path, [{"prompt": "b"}], "-m", tiny_path, "-o", out)
    assert result.exit_code == 1 and "line 1, is not an answer" in result.stderr
    assert out.read_text() == "a shopping list\nmilk\n" and before


def test_token_ids_of_logit_bias_may_be_strings_and_logprobs_are_reported(
    tiny_path: Path, tmp_path: Path
) -> None:
    line: Line = {
        "prompt": "ab", "max_tokens": 2, "logprobs": 2, "prompt_logprobs": 0,
        "logit_bias": {"65": 100},
    }  # fmt: skip
    result = invoke(tmp_path, [line], "-m", tiny_path, "--stats")
    [record] = map(json.loads, result.stdout.splitlines())
    [answer] = record["outputs"]
    assert answer["text"] == "AA" and answer["token_ids"] == [65, 65]
    assert all(set(row["65"]) >= {"logprob", "rank", "bytes"} for row in answer["logprobs"])
    assert record["prompt_logprobs"][0] is None and len(record["prompt_logprobs"]) > 1
    assert record["timing"]["time_to_first_token"] > 0


def test_the_defaults_are_those_of_run_and_are_printed(tiny_path: Path, tmp_path: Path) -> None:
    result = invoke(tmp_path, [{"prompt": "hello"}], "-m", tiny_path, "-n", "9", "--top-k", "5")
    assert "[defaults: temperature 0, max_tokens 9, top_k 5]" in result.stderr
    [record] = map(json.loads, result.stdout.splitlines())
    run = ["run", "hello", "--raw", "-m", str(tiny_path), "-n", "9", "--json"]
    expected = json.loads(CliRunner().invoke(main, run).stdout)
    assert record["outputs"][0]["token_ids"] == expected["token_ids"]


def test_requests_may_come_from_standard_input(tiny_path: Path) -> None:
    lines = '\ufeff{"prompt": "a", "max_tokens": 1}\r\n\n{"prompt": "b", "max_tokens": 1}'
    result = CliRunner().invoke(main, ["batch", "-", "-m", str(tiny_path)], input=lines)
    assert result.exit_code == 0, result.output
    assert sorted(json.loads(line)["line"] for line in result.stdout.splitlines()) == [1, 3]


def test_lines_of_openai_are_answered_in_its_form(tiny_path: Path, tmp_path: Path) -> None:
    lines: list[Line] = [
        chat_line("chat", max_completion_tokens=3, logprobs=True, top_logprobs=2, n=2, seed=None),
        text_line("text", prompt="the", max_tokens=3, logprobs=1, model="gpt-4o", user="me"),
        text_line("ids", prompt=[116, 104], max_tokens=2),
        text_line("stream", prompt="the", stream=True),
        text_line("many", prompt=["a", "b"]),
        text_line("unknown", prompt="the", colour="blue"),
        {**text_line("url", prompt="the"), "url": "/v1/embeddings"},
        {**text_line("method", prompt="the"), "method": "GET"},
    ]
    result = invoke(tmp_path, lines, "-m", tiny_path)
    assert result.exit_code == 1 and "5 failed" in result.stderr
    found = {r["custom_id"]: r for r in map(json.loads, result.stdout.splitlines())}
    assert sorted(found) == sorted(line["custom_id"] for line in lines if isinstance(line, dict))
    for name, part in (
        ("stream", "stream must be False"),
        ("many", "prompt must be one text"),
        ("unknown", "'colour' in the body"),
        ("url", "url is '/v1/embeddings'"),
        ("method", "method is 'GET'"),
    ):
        assert found[name]["response"]["status_code"] == 400 and found[name]["error"]
        assert part in found[name]["response"]["body"]["error"]["message"]
    chat = found["chat"]["response"]["body"]
    assert found["chat"]["error"] is None and found["chat"]["response"]["status_code"] == 200
    assert chat["object"] == "chat.completion" and len(chat["choices"]) == 2
    assert chat["choices"][0]["message"]["role"] == "assistant"
    assert chat["usage"]["completion_tokens"] == 6
    assert all(len(t["top_logprobs"]) >= 2 for t in chat["choices"][0]["logprobs"]["content"])
    text = found["text"]["response"]["body"]
    [expected] = LLM(tiny_path).generate("the", SamplingParams(temperature=0, max_tokens=3))
    assert text["object"] == "text_completion"
    assert text["choices"][0]["text"] == expected.outputs[0].text
    assert len(text["choices"][0]["logprobs"]["token_logprobs"]) == 3
    assert found["ids"]["response"]["body"]["usage"]["prompt_tokens"] == 2


@pytest.mark.slow
def test_an_interrupted_run_leaves_whole_lines_and_is_continued(
    long_path: Path, tmp_path: Path
) -> None:
    lines: list[Line] = [
        {"id": i, "prompt": "a" * (i + 1), "max_tokens": 1500, "ignore_eos": True}
        for i in range(10)
    ]
    source, out = write(tmp_path / "requests.jsonl", lines), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "pellucid", "batch", str(source), "-m", str(long_path)]
    command += ["--max-num-seqs", "2", "-o", str(out)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE) as process:
            before = len(read(out)) if out.exists() else 0
            deadline = time.monotonic() + 600
            while not out.exists() or out.read_bytes().count(b"\n") < before + 2:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(number)
            _, errors = process.communicate(timeout=600)
        assert process.returncode in (128 + number, 0) and b"Traceback" not in errors, errors
        assert out.read_bytes().endswith(b"\n")
        found = read(out)
        assert process.returncode or len(found) == 10
        # on a busy machine the others may be answered before the signal comes
        assert before + 2 <= len(found) <= 10 and len({r["id"] for r in found}) == len(found)
    # What is left is short now; the ids of the others must not be asked again
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, check=True, timeout=300)
    assert f"{len(found)} were answered before".encode() in result.stderr
    assert sorted(r["id"] for r in read(out)) == list(range(10))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_gives_every_answer_once(
    long_path: Path, tmp_path: Path
) -> None:
    lines: list[Line] = [
        {"id": i, "prompt": "a" * (i + 1), "max_tokens": 300, "temperature": 1.0, "seed": i}
        for i in range(24)
    ]
    source, out = write(tmp_path / "requests.jsonl", lines), tmp_path / "out.jsonl"
    arguments = ["batch", str(source), "-m", str(long_path), "--max-num-seqs", "3", "-o"]
    command = [sys.executable, "-m", "pellucid", *arguments, str(out)]
    for kill in range(3):
        before = out.read_bytes().count(b"\n") if out.exists() else 0
        with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
            # among the answers
            while process.poll() is None and (
                not out.exists() or out.read_bytes().count(b"\n") < before + 1 + kill
            ):
                time.sleep(0.001)
            process.kill()
        whole = out.read_bytes()
        assert whole.count(b"\n") > before
        if kill == 1:  # what a machine that stops leaves: a part of the last line
            out.write_bytes(whole[:-20])
    assert subprocess.run(command, env=ENVIRONMENT, check=False).returncode == 0
    answers = read(out)
    assert sorted(answer["id"] for answer in answers) == list(range(24))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    undisturbed = tmp_path / "undisturbed.jsonl"
    assert CliRunner().invoke(main, [*arguments, str(undisturbed)]).exit_code == 0
    assert texts(answers) == texts(read(undisturbed))


def test_a_program_that_writes_requests_as_it_goes_gets_answers_as_it_goes(tiny_path: Path) -> None:
    command = [sys.executable, "-m", "pellucid", "batch", "-", "-m", str(tiny_path)]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-3
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        for i in range(3):
            process.stdin.write(b'{"id": %d, "prompt": "a", "max_tokens": 1}\n' % i)
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == i
        process.send_signal(signal.SIGINT)  # while it waits for the next line
        assert process.wait(600) == 130


def test_a_full_disk_leaves_whole_lines_and_the_run_can_be_continued(
    tiny_path: Path, tmp_path: Path
) -> None:
    lines: list[Line] = [{"id": i, "prompt": "a", "max_tokens": 5} for i in range(9)]
    source, out = write(tmp_path / "requests.jsonl", lines), tmp_path / "out.jsonl"
    script = (
        "import resource; from pellucid.__main__ import main; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); main()"
    )
    arguments = ["batch", str(source), "-m", str(tiny_path), "-o", str(out)]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.endswith(f"error: {out}: File too large\n")
    assert out.read_bytes().endswith(b"\n") and 0 < len(read(out)) < 9
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert sorted(texts(read(out))) == list(range(9))


def test_two_runs_do_not_write_to_one_file(tiny_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with out.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = invoke(tmp_path, [{"prompt": "a"}], "-m", tiny_path, "-o", out)
    assert result.exit_code == 1 and f"another run writes to {out}" in result.stderr


def test_a_request_that_can_never_wait_is_an_error_and_is_not_tried_for_ever(
    tiny_path: Path, tmp_path: Path
) -> None:
    result = invoke(tmp_path, [{"prompt": "abc"}], "-m", tiny_path, "--max-waiting-tokens", "2")
    (record,) = map(json.loads, result.stdout.splitlines())
    assert "3 prompt tokens were submitted together" in record["error"]
    assert result.exit_code == 1
