"""`pellucid run` and `pellucid chat` with a tiny real model: what comes out is what the Python API
gives, in a pipe and in a terminal.
"""

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import pellucid
from pellucid import LLM, SamplingParams
from pellucid.cli.main import main
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf

from .terminal import COMMAND, terminal

pytestmark = pytest.mark.slow  # each test starts a program

DEFAULTS: dict[str, Any] = {"temperature": 0}


def invoke(*arguments: str | Path, text: str = "") -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)), input=text)


def run_json(*arguments: str | Path, text: str = "") -> dict[str, Any]:
    result = invoke("run", *arguments, "--json", text=text)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def copy_with(source: Path, target: Path, **changes: object) -> Path:
    """The same model under other metadata; None leaves a key out."""
    with GGUFFile.open(source) as file:
        said = {
            **file.metadata.typed(),
            **{key.replace("__", "."): value for key, value in changes.items()},
        }
        write_gguf(
            target,
            {k: v for k, v in said.items() if v is not None},
            ((name, file.tensor(name)) for name in file.tensors),
        )
    return target


@pytest.fixture(scope="module")
def bare_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model without its chat template."""
    return copy_with(
        tiny_path,
        tmp_path_factory.mktemp("bare") / "bare.gguf",
        **{"tokenizer__chat_template": None},
    )


def test_run_gives_what_the_python_api_gives(tiny: LLM, tiny_path: Path) -> None:
    found = run_json("hello", "-m", tiny_path, "--max-tokens", "20")
    [expected] = tiny.chat(
        [{"role": "user", "content": "hello"}],
        SamplingParams(max_tokens=20, **DEFAULTS),
        use_tqdm=False,
    )
    assert (
        found["prompt_token_ids"] == expected.prompt_token_ids
        and found["prompt"] == expected.prompt
    )
    assert (found["text"], found["token_ids"]) == (
        expected.outputs[0].text,
        expected.outputs[0].token_ids,
    )
    assert (found["finish_reason"], found["stop_reason"]) == (
        expected.outputs[0].finish_reason,
        expected.outputs[0].stop_reason,
    )
    assert (found["prompt_tokens"], found["completion_tokens"]) == (
        len(expected.prompt_token_ids),
        len(expected.outputs[0].token_ids),
    )
    assert (
        found["time_to_first_token"] > 0
        and found["prompt_tokens_per_second"] > 0
        and found["decode_tokens_per_second"] > 0
    )


def test_run_takes_every_sampling_option(tiny: LLM, tiny_path: Path) -> None:
    options = {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.8,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "presence_penalty": 0.1,
        "max_tokens": 12,
        "seed": 7,
    }
    words = [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    found = run_json("hello", "-m", tiny_path, *words, "--system", "be brief")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    [expected] = tiny.chat(messages, SamplingParams(**options), use_tqdm=False)  # type: ignore[arg-type]
    assert found["token_ids"] == expected.outputs[0].token_ids
    assert (
        run_json("hello", "-m", tiny_path, *words[:-1], "8", "--system", "be brief")["token_ids"]
        != found["token_ids"]
    )


def test_run_raw_and_run_without_a_template_continue_the_text(
    tiny: LLM, tiny_path: Path, bare_path: Path
) -> None:
    [expected] = tiny.generate("hello", SamplingParams(max_tokens=8, **DEFAULTS), use_tqdm=False)
    for found in (
        run_json("hello", "-m", tiny_path, "--raw", "--max-tokens", "8"),
        run_json("hello", "-m", bare_path, "--max-tokens", "8"),
    ):
        assert (
            found["prompt_token_ids"] == expected.prompt_token_ids == tiny.tokenizer.encode("hello")
        )
        assert found["token_ids"] == expected.outputs[0].token_ids


def test_the_answer_is_on_standard_output_and_its_cost_on_standard_error(tiny_path: Path) -> None:
    text = run_json("hello", "-m", tiny_path, "--max-tokens", "9")["text"]
    result = invoke("run", "hello", "-m", tiny_path, "--max-tokens", "9")
    assert result.stdout == (text if text.endswith("\n") else text + "\n")
    figures = (
        r"\[prompt \d+ tokens \([\d.]+/s\) · answer 9 tokens \([\d.]+/s\) · "
        r"first token after [\d.]+ s · temperature 0, max_tokens 9 · cut at --max-tokens 9\]\n"
    )
    assert re.fullmatch(figures, result.stderr)
    quiet = invoke("run", "hello", "-m", tiny_path, "--max-tokens", "9", "-q")
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


def test_stats_tell_why_it_took_that_long(tiny_path: Path) -> None:
    words = ("run", "hello", "-m", tiny_path, "--max-tokens", "9")
    told = invoke(*words, "--stats")
    assert re.search(r"^\[\d+\.\d\d s: \d+% .*prefill \(\d+ tokens?\)", told.stderr, re.MULTILINE)
    assert " s: " not in invoke(*words).stderr  # one line, unless it is asked for
    report = json.loads(invoke(*words, "--json").stdout)
    assert report["explanation"].split(" s: ")[0].replace(".", "").isdigit()
    assert {"bound", "share_of_ceiling", "cached_tokens", "time_in_queue"} <= report.keys()
    assert report["time_in_prefill"] > 0 and report["time_in_decode"] >= 0


@pytest.mark.parametrize("arguments", [["-"], []])
def test_a_prompt_can_be_piped_in(tiny_path: Path, arguments: list[str]) -> None:
    piped = run_json(*arguments, "-m", tiny_path, "--max-tokens", "3", text="line one\nline two\n")
    assert (
        piped["prompt_token_ids"]
        == run_json("line one\nline two\n", "-m", tiny_path, "--max-tokens", "3")[
            "prompt_token_ids"
        ]
    )


def test_a_stop_string_ends_the_answer_and_is_not_part_of_it(tiny_path: Path) -> None:
    whole = run_json("hello", "-m", tiny_path, "--max-tokens", "30")["text"]
    stop = whole[5:7]
    found = run_json(
        "hello", "-m", tiny_path, "--max-tokens", "30", "--stop", "never there", "--stop", stop
    )
    assert found["text"] == whole[: whole.index(stop)]
    assert (found["finish_reason"], found["stop_reason"]) == ("stop", stop)
    assert (
        "stopped at "
        in invoke("run", "hello", "-m", tiny_path, "--max-tokens", "30", "--stop", stop).stderr
    )


def test_an_answer_that_fills_the_context_says_so(tiny_path: Path) -> None:
    result = invoke("run", "hello", "-m", tiny_path, "--max-model-len", "50")
    assert result.exit_code == 0 and "cut: the context of 50 tokens is full]" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "x" * 200, "-m", "TINY"], "96"),
        (
            ["run", "hello", "-m", "TINY", "--max-model-len", "97"],
            "max_model_len is 97; the model was made for at most 96",
        ),
        (
            ["run", "hello", "-m", "BARE", "--system", "be brief"],
            "has no chat template, so it cannot take --system",
        ),
        (
            ["chat", "-m", "BARE"],
            "has no chat template, so it cannot hold a conversation; `pellucid run` continues a "
            "text",
        ),
    ],
)
def test_what_the_model_cannot_do_is_one_sentence(
    tiny_path: Path, bare_path: Path, arguments: list[str], sentence: str
) -> None:
    result = invoke(
        *(str({"TINY": tiny_path, "BARE": bare_path}.get(word, word)) for word in arguments)
    )
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr.startswith("pellucid: error: ")
        and sentence in result.stderr
        and result.stderr.count("\n") == 1
    )


# ---- chat, over a pipe


def chat(path: Path, *lines: str, options: tuple[str, ...] = ()) -> Result:
    result = invoke(
        "chat",
        "-m",
        path,
        "--max-tokens",
        "4",
        "-q",
        *options,
        text="".join(line + "\n" for line in lines),
    )
    assert result.exit_code == 0, result.output
    return result


def expected_answers(llm: LLM, *conversations: list[str]) -> str:
    """What the API answers to each list of alternating messages, after an optional system message
    marked by '!'.
    """
    answers = []
    for said in conversations:
        system = [{"role": "system", "content": said[0][1:]}] if said[0].startswith("!") else []
        turns = said[len(system) :]
        messages = system + [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
        ]
        [output] = llm.chat(messages, SamplingParams(max_tokens=4, **DEFAULTS), use_tqdm=False)
        answers.append(output.outputs[0].text)
    return "".join(text if text.endswith("\n") else text + "\n" for text in answers)


def test_a_conversation_is_remembered(tiny: LLM, tiny_path: Path) -> None:
    first = expected_answers(tiny, ["hi"]).removesuffix("\n")
    result = chat(tiny_path, "hi", "", "on")
    assert result.stdout == expected_answers(tiny, ["hi"], ["hi", first, "on"])


def test_clear_forgets_and_system_is_kept(tiny: LLM, tiny_path: Path) -> None:
    result = chat(
        tiny_path,
        "/system",
        "/system  be odd ",
        "hi",
        "/clear",
        "you",
        "/exit",
        "never",
        options=("--system", "be even"),
    )
    assert result.stdout == expected_answers(tiny, ["!be odd", "hi"], ["!be odd", "you"])
    said = [
        line
        for line in result.stderr.splitlines()
        if line != "[the answer is cut at --max-tokens 4]"
    ]
    assert said == [
        "[the system message is 'be even']",
        "[the system message is 'be odd']",
        "[a new conversation]",
    ]


def test_a_message_may_have_several_lines(tiny: LLM, tiny_path: Path) -> None:
    assert chat(tiny_path, '"""a', "b", 'c"""').stdout == expected_answers(tiny, ["a\nb\nc"])
    assert chat(tiny_path, '"""', "a", '"""').stdout == expected_answers(tiny, ["a\n"])
    assert chat(tiny_path, '"""one"""').stdout == expected_answers(tiny, ["one"])


def test_an_unknown_command_is_not_sent_to_the_model(tiny: LLM, tiny_path: Path) -> None:
    result = chat(tiny_path, "/etc/hosts", " /etc/hosts", "/help")
    assert result.stdout == expected_answers(tiny, [" /etc/hosts"])
    assert (
        "there is no command /etc/hosts; /help lists them" in result.stderr
        and "/system [TEXT]" in result.stderr
    )


def test_a_message_that_does_not_fit_is_refused_and_the_conversation_goes_on(
    tiny: LLM, tiny_path: Path
) -> None:
    result = chat(tiny_path, "hi", "x" * 90, "/clear", "hi")
    assert result.stdout == expected_answers(tiny, ["hi"], ["hi"])
    [refused] = [
        line
        for line in result.stderr.splitlines()
        if line.endswith("; /clear begins a new conversation]")
    ]
    assert "96" in refused


def test_an_answer_cut_by_the_context_is_announced(tiny_path: Path) -> None:
    result = invoke("chat", "-m", tiny_path, "--max-model-len", "50", text="hi\n")
    assert (
        "[the answer is cut: the context of 50 tokens is full; /clear begins a new conversation]\n"
        in result.stderr
    )
    assert re.search(r"· context 50 of 50\]\n$", result.stderr)


# ---- in a terminal


def test_ctrl_c_stops_an_answer_and_not_the_program(long_path: Path) -> None:
    with terminal("chat", "-m", long_path) as screen:
        screen.wait_for(rb">>> ")
        screen.type(b"hello\r")
        screen.wait_for(rb"hello\r\n.{20}")
        screen.type(b"\x03")
        screen.wait_for(rb"\[prompt \d+ tokens .* stopped\]\r\n.*>>> ")
        # at the prompt it clears the line
        screen.type_until(b"\x03", rb"\[Ctrl-D or /exit leaves\]\r\n.*>>> ")
        screen.type(b"again\r")
        screen.wait_for(rb"again\r\n.{20}")
        screen.type(b"\x03")
        tokens = screen.wait_for(rb"\[prompt (\d+) tokens .* stopped\]\r\n.*>>> ")
        assert int(tokens[1]) > 40  # the answer that was stopped is part of the conversation
        screen.type(b"\x04")
        assert screen.wait_for_end()[0] == 0


def test_ctrl_c_leaves_run_with_130_and_no_traceback(long_path: Path) -> None:
    with terminal("run", "hello", "-m", long_path, "--max-tokens", "90000") as screen:
        screen.wait_for(rb".{20}")
        screen.type(b"\x03")
        status, rest = screen.wait_for_end()
        assert status == 130 and b"Traceback" not in rest


def test_sigterm_ends_a_chat_quietly(long_path: Path) -> None:
    with terminal("chat", "-m", long_path) as screen:
        screen.wait_for(rb">>> ")
        while screen.process.poll() is None:  # as with type_until
            screen.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                screen.process.wait(3)
        status, rest = screen.wait_for_end()
        assert status == 143 and b"Traceback" not in rest


def test_a_terminal_gets_no_control_characters_of_a_model(tiny_path: Path) -> None:
    """The tiny model writes random bytes, ESC among them; a pipe gets them as they are."""
    arguments = ["run", "hello", "-m", str(tiny_path), "--temperature", "5", "--top-p", "1", "-q"]
    seed = next(
        s for s in range(50) if "\x1b" in run_json(*arguments[1:], "--seed", str(s))["text"]
    )
    assert "\x1b" in invoke(*arguments, "--seed", str(seed)).stdout
    with terminal(*arguments, "--seed", str(seed)) as screen:
        status, seen = screen.wait_for_end()
    assert status == 0 and b"\\x1b" in seen
    assert not re.search(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]", seen)


def test_a_reader_that_goes_away_ends_the_answer_without_a_word(long_path: Path) -> None:
    words = [*COMMAND, "run", "hello", "-q", "-m", str(long_path), "--max-tokens", "90000"]
    environment = dict(os.environ, PYTHONPATH=str(Path(pellucid.__file__).parents[1]))
    with subprocess.Popen(
        words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert len(process.stdout.read(20)) == 20
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(600) == 1
