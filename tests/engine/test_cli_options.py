"""Options of `run`: all fields of the configs, what a model recommends, templates and files."""

import json
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from pellucid import LLM, EngineConfig, SamplingParams
from pellucid.cli.main import main
from pellucid.weights.gguf import GGUFFile
from pellucid.weights.gguf_writer import write_gguf


def run(*arguments: str | Path) -> dict[str, Any]:
    result = CliRunner().invoke(main, ["run", *map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def recommending_path(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, whose authors recommend how to sample."""
    path = tmp_path_factory.mktemp("recommends") / "recommends.gguf"
    with GGUFFile.open(tiny_path) as file:
        said = {**file.metadata.typed(), "general.sampling.temp": 0.7, "general.sampling.top_k": 9}
        write_gguf(path, said, ((name, file.tensor(name)) for name in file.tensors))
    return path


def options_of(command: str) -> set[str]:
    found = main.get_command(click.Context(main), command)
    assert found is not None
    return {
        name.removeprefix("--").replace("-", "_")
        for parameter in found.params
        for name in parameter.opts
    }


def test_every_field_of_the_configs_is_an_option() -> None:
    sampling = set(SamplingParams.__dataclass_fields__) - {"detokenize", "structured_outputs"}
    assert sampling <= options_of("batch")
    assert sampling - {"n"} <= options_of("run")
    assert sampling - {"n", "logprobs", "prompt_logprobs"} <= options_of("chat")
    engine = set(EngineConfig.__dataclass_fields__) - {"backend_options"}
    assert engine | {"threads", "isa"} <= options_of("batch")


def test_the_defaults_are_what_the_model_recommends(recommending_path: Path) -> None:
    auto = run("hi", "-m", recommending_path, "-n", "5")
    assert auto["sampling"] == {"temperature": 0.7, "top_k": 9, "max_tokens": 5}
    said = run("hi", "-m", recommending_path, "-n", "5", "--temperature", "0")
    assert said["sampling"] == {"temperature": 0, "top_k": 9, "max_tokens": 5}
    none = run("hi", "-m", recommending_path, "-n", "5", "--generation-config", "none")
    assert none["sampling"] == {"temperature": 0, "max_tokens": 5}
    shown = CliRunner().invoke(main, ["run", "hi", "-m", str(recommending_path), "-n", "5"])
    assert "temperature 0.7 (the model's), max_tokens 5, top_k 9 (the model's)" in shown.stderr


def test_plain_sampling_is_greedy_without_penalties(tiny: LLM, tiny_path: Path) -> None:
    found = run("hello", "-m", tiny_path, "--raw", "-n", "20")
    [expected] = tiny.generate("hello", SamplingParams(temperature=0, max_tokens=20))
    assert found["sampling"] == {"temperature": 0, "max_tokens": 20}
    assert found["token_ids"] == expected.outputs[0].token_ids


def test_options_of_many_values_and_of_mappings(tiny_path: Path) -> None:
    assert run("hi", "-m", tiny_path, "-n", "3", "--logit-bias", "65=100")["text"] == "AAA"
    allowed = ("--allowed-token-ids", "66", "--allowed-token-ids", "67")
    assert set(run("hi", "-m", tiny_path, "-n", "8", *allowed)["text"]) <= set("BC")
    assert run("hi", "-m", tiny_path, "-n", "-1", "--ignore-eos")["finish_reason"] == "length"


def test_logprobs_are_in_the_report_and_in_a_table(tiny_path: Path) -> None:
    found = run("hi", "-m", tiny_path, "-n", "2", "--logprobs", "1", "--prompt-logprobs", "0")
    assert len(found["logprobs"]) == 2 and found["prompt_logprobs"][0] is None
    for token_id, row in zip(found["token_ids"], found["logprobs"], strict=True):
        assert row[str(token_id)]["rank"] == 1 and row[str(token_id)]["bytes"]
    words = ["run", "hi", "-m", str(tiny_path), "-n", "2", "--logprobs", "1"]
    shown = CliRunner().invoke(main, words)
    assert shown.stderr.startswith("token") and "logprob" in shown.stderr.splitlines()[0]


def test_special_tokens_of_a_raw_prompt_are_parsed_unless_told_otherwise(
    tiny: LLM, tiny_path: Path
) -> None:
    text = "<|im_start|>hi"
    parsed = run(text, "-m", tiny_path, "--raw", "-n", "1")["prompt_token_ids"]
    plain = run(text, "-m", tiny_path, "--raw", "-n", "1", "--no-special")["prompt_token_ids"]
    assert parsed == tiny.tokenizer.encode(text, parse_special=True) and len(parsed) == 3
    assert plain == tiny.tokenizer.encode(text) and len(plain) > 3


def test_a_prompt_and_a_template_may_come_from_files(tiny_path: Path, tmp_path: Path) -> None:
    prompt, template = tmp_path / "prompt.txt", tmp_path / "template.jinja"
    prompt.write_text("from a file\n")
    template.write_text("{{ mood }}: {{ messages[0].content }}")
    found = run(
        "-f", prompt, "-m", tiny_path, "-n", "1", "--chat-template", template,
        "--chat-template-kwargs", '{"mood": "calm"}',
    )  # fmt: skip
    assert found["prompt"] == "calm: from a file\n"
    text = "{{ messages[0].content }}!"
    assert run("a", "-m", tiny_path, "-n", "1", "--chat-template", text)["prompt"] == "a!"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["hi", "-f", __file__], "give a PROMPT or --file, not both"),
        (["hi", "--raw", "--chat-template", "x"], "which --raw leaves out"),
        (["hi", "--no-special"], "--no-special needs --raw"),
        (["hi", "--logit-bias", "5"], "must be a token id, =, and a number"),
        (["hi", "--chat-template-kwargs", "[1]"], "it must hold a JSON object"),
        (["hi", "--backend", "gpu"], "'gpu' is not one of 'native', 'reference'"),
    ],
)
def test_options_that_make_no_sense_are_refused(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(main, ["run", *arguments])
    assert result.exit_code == 2 and sentence in result.stderr
