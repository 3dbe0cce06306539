"""The commands as a user meets them: what they print where, and with what exit code. No model is
run here.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import pellucid
from pellucid.cli.main import _sentence, main
from pellucid.cli.terminal import harmless, one_line
from pellucid.units import format_bytes
from pellucid.weights.catalogue import CATALOGUE, DEFAULT_MODEL

COMMAND = [sys.executable, "-c", "from pellucid.cli.main import main; main(prog_name='pellucid')"]
RUN = ["run", "hello", "-m"]


def pellucid_command(
    *arguments: str, cwd: Path, text: str = ""
) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own, with an empty cache and no network to ask."""
    environment = dict(
        os.environ,
        PYTHONPATH=str(Path(pellucid.__file__).parents[1]),
        HF_HOME=str(cwd),
        HF_HUB_OFFLINE="1",
    )
    environment["XDG_CACHE_HOME"] = str(cwd)
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=cwd,
        env=environment,
        input=text,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, which is the cache too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([*RUN, "missing.gguf"], "there is no file or folder 'missing.gguf'"),
        ([*RUN, "smollm2"], "did you mean 'smollm2-135m-instruct'?"),
        ([*RUN, "magic.gguf"], "magic.gguf"),
        ([*RUN, "cut.gguf"], "cut.gguf"),
        ([*RUN, "empty.gguf"], "empty.gguf"),
        ([*RUN, "."], ". holds 3 GGUF files; name one of them: cut.gguf, empty.gguf, magic.gguf"),
        (["inspect", "."], ". holds 3 GGUF files; name one of them"),
        (["inspect", "cut.gguf"], "cut.gguf"),
        (["inspect", "magic.gguf"], "magic.gguf"),
        (["chat", "-m", "magic.gguf"], "magic.gguf"),
        (
            ["pull", "nothing-like-it"],
            "'nothing-like-it' is no file or folder here, and no model's name",
        ),
        (["run", "hello", "--temperature", "-1"], "temperature is -1.0"),
        (["run", "hello", "--top-p", "0"], "top_p is 0.0"),
        (["run", "hello", "--top-k", "-7"], "top_k is -7"),
        (["run", "hello", "--max-tokens", "0"], "max_tokens is 0"),
        (["run", "hello", "--temperature", "nan"], "temperature is nan"),
        (["run", "hello", "--seed", "-9999999999999999999999"], "seed is -9999999999999999999999"),
        (["run", "hello", "--max-model-len", "0"], "max_model_len is 0"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_1(
    offline: Path, arguments: list[str], sentence: str
) -> None:
    (offline / "magic.gguf").write_bytes(b"GGML" + bytes(100))
    (offline / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + (5).to_bytes(8, "little"))
    (offline / "empty.gguf").touch()
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("pellucid: error: ") and sentence in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.endswith("\n")


@pytest.mark.parametrize(
    ("arguments", "text", "sentence"),
    [
        (["run", ""], "", "the prompt is empty"),
        (["run"], "", "the prompt is empty"),
        (["run", "-"], "", "the prompt is empty"),
        (["run", "-"], b"\xff\xfe", "the prompt is not UTF-8 text"),
        (["run", "a\udcff"], "", "the prompt is not UTF-8 text"),
        (["run", "hello", "--raw", "--system", "x"], "", "give one of the two"),
        (["run", "hello", "--temperature", "warm"], "", "'warm' is not a valid float"),
        (["run", "hello", "--tempreature", "1"], "", "--temperature"),
        (["fly"], "", "No such command 'fly'"),
    ],
)
def test_a_wrong_command_line_is_explained_with_exit_code_2(
    arguments: list[str], text: str | bytes, sentence: str
) -> None:
    result = CliRunner().invoke(main, arguments, input=text)
    assert result.exit_code == 2
    assert result.stdout == "" and sentence in result.stderr


@pytest.mark.slow
def test_a_real_process_shows_no_traceback_unless_asked(tmp_path: Path) -> None:
    done = pellucid_command("run", "hello", "-m", "missing.gguf", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pellucid: error: there is no file or folder 'missing.gguf'\n"
    for arguments in (["--debug", "run", "hello"], ["run", "hello", "--debug"]):
        done = pellucid_command(*arguments, "-m", "missing.gguf", cwd=tmp_path)
        assert done.returncode == 1 and done.stderr.startswith("Traceback")
        assert done.stderr.endswith(
            "pellucid.errors.ConfigError: there is no file or folder 'missing.gguf'\n"
        )


def test_a_name_is_quoted_harmlessly(offline: Path) -> None:
    result = CliRunner().invoke(main, [*RUN, "a\x1b[2J\nb\x9bc"])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert not set("\x1b\x9b") & set(result.stderr)


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = " ".join(
        f"'{word}'"
        for word in [sys.executable, "-c", COMMAND[2].replace("'", '"'), "list", "--json"]
    )
    environment = dict(
        os.environ, PYTHONPATH=str(Path(pellucid.__file__).parents[1]), PYTHONUNBUFFERED="1"
    )
    done = subprocess.run(
        ["sh", "-c", f"{command} | true"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stderr == ""


def test_models_lists_what_is_known_and_what_is_here(offline: Path) -> None:
    folder = offline / "pellucid" / "models"
    folder.mkdir(parents=True)
    known = CATALOGUE[DEFAULT_MODEL]
    with (folder / known.file).open("wb") as file:
        file.truncate(known.num_bytes)  # sparse: only its size counts here
    (folder / CATALOGUE["gemma-3-270m"].file).write_bytes(b"half")
    result = CliRunner().invoke(main, ["list", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 0 and report["folder"] == str(folder)
    assert [m["name"] for m in report["models"]] == list(CATALOGUE)
    assert {m["name"] for m in report["models"] if m["here"]} == {DEFAULT_MODEL}
    assert {m["name"] for m in report["models"] if m["default"]} == {DEFAULT_MODEL}
    assert next(m for m in report["models"] if m["here"])["path"] == str(folder / known.file)
    result = CliRunner().invoke(main, ["list"])
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and all(m.licence in result.stdout for m in CATALOGUE.values())
    assert [line.split()[:2] for line in lines[1:3]] == [
        [DEFAULT_MODEL, "yes"],
        ["gemma-3-270m", "no"],
    ]


def test_version_says_what_it_runs_on() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert result.exit_code == 0
    first, python, numpy, cpu = result.stdout.splitlines()
    assert first == f"pellucid {pellucid.__version__}"
    assert python == "Python " + ".".join(map(str, sys.version_info[:3]))
    assert numpy.startswith("NumPy ") and cpu.startswith("CPU ")


def test_help_is_there_for_every_command_and_loads_no_array_library() -> None:
    commands = main.list_commands(click.Context(main))
    assert set(commands) >= {"run", "chat", "pull", "list", "rm", "inspect", "perplexity"}
    for name in commands:
        result = CliRunner().invoke(main, [name, "--help"])
        assert result.exit_code == 0
        assert "--debug" in result.stdout or "COMMAND" in result.stdout  # of a group's commands
    heavy = {
        "numpy",
        "tokenizers",
        "huggingface_hub",
        "jinja2",
        "tqdm",
        "prompt_toolkit",
        "asyncio",
    }
    script = f"import sys; import pellucid.cli.main; print({heavy} & set(sys.modules))"
    environment = dict(os.environ, PYTHONPATH=str(Path(pellucid.__file__).parents[1]))
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert done.stdout == "set()\n"


def test_the_package_run_as_a_module_is_the_command_line() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pellucid", "--help"],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert result.stdout.startswith("Usage: pellucid ") and "verify" in result.stdout


def test_control_characters_are_written_out_and_letters_are_not() -> None:
    assert (
        harmless("tab\tline\nbell\x07 \x1b]0;title\x07 \x9b2J \x7f \r")
        == "tab\tline\nbell\\x07 \\x1b]0;title\\x07 \\x9b2J \\x7f \\x0d"
    )
    assert one_line("a\nb\u2028c") == "a\\x0ab\\u2028c"
    assert harmless(text := "naïve 日本語 🙂 \u200d عربى") == one_line(text) == text


def test_sizes_are_written_as_downloads_count_them() -> None:
    assert [format_bytes(n) for n in (0, 999, 1000, 98_362_432, 253_113_024, 1_117_320_768)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "98.4 MB",
        "253 MB",
        "1.1 GB",
    ]


@pytest.mark.parametrize("reason", ["can't start new thread", "Resource temporarily unavailable"])
def test_a_limit_of_threads_is_no_bug(reason: str) -> None:
    assert _sentence(RuntimeError(reason)).startswith("no thread could be started")
