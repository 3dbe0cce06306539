"""Options of speculation that are wrong: one sentence each, before anything is looked for, fetched
or loaded. The model of these tests does not exist, so an error about it would come too late.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pellucid import LLM, AsyncEngine, EngineConfig
from pellucid.cli.main import main
from pellucid.engine import loader
from pellucid.errors import ConfigError

NOWHERE = "/nowhere/model.gguf"
HEADS = "it needs weights that were trained to draft for the model"


def config(**fields: Any) -> dict[str, Any]:
    return {"speculative_config": {"method": "ngram"} | fields}


REFUSED: list[tuple[dict[str, Any], str]] = [
    # methods
    ({"speculative": "ngrm"}, "no method of speculation 'ngrm'; did you mean 'ngram'?"),
    ({"speculative": "NGRAM"}, "no method of speculation 'NGRAM'"),
    ({"speculative": "draft"}, "no method of speculation 'draft': name the model too"),
    ({"speculative": "[ngram]"}, "speculative_config is not a JSON object"),
    ({"speculative": '"ngram"'}, "no method of speculation '\"ngram\"'"),
    ({"speculative": "lookup"}, "'lookup': its name here is ngram"),
    ({"speculative": "ngram,suffix"}, "no method of speculation 'ngram,suffix'"),
    ({"speculative": ""}, "speculative is ''; it must be a string of 1 to 4096 characters"),
    ({"speculative": "x" * 5000}, "it must be a string of 1 to 4096 characters"),
    ({"speculative": "draft:"}, "draft: is followed by a model"),
    *(({"speculative": name}, f"'{name}': {HEADS}") for name in ("eagle", "medusa", "mtp")),
    *(({"speculative": value}, "speculative is ") for value in (3, True, 1.5, b"ngram", ["ngram"])),
    # numbers of tokens
    *(
        (
            {"speculative": "ngram", "num_speculative_tokens": k},
            "num_speculative_tokens is .*; it must be an integer between 1 and 64",
        )
        for k in (0, -1, 65, 10**30, 2.5, float("nan"), "3", True, [3])
    ),
    (
        {"speculative": "ngram", "num_speculative_tokens": 8, "max_num_batched_tokens": 8},
        "num_speculative_tokens is 8; a step of max_num_batched_tokens, 8, has room for a token "
        "and at most 7 drafts",
    ),
    (
        {"speculative": None, "num_speculative_tokens": 3},
        "num_speculative_tokens is 3, and speculative is None",
    ),
    # vLLM's mapping, and JSON
    *(
        ({"speculative_config": value}, "speculative_config is .*; it must be a mapping")
        for value in (3, True, ["ngram"], [("method", "ngram")], b"{}")
    ),
    *(
        ({"speculative_config": text}, "speculative_config (holds|is not a JSON object) ?")
        for text in ("", "{", "[]", "3", '"ngram"', "null", "ngram", "{'method': 'ngram'}")
    ),
    ({"speculative": '["ngram"]'}, "speculative_config holds a list; it must hold a JSON object"),
    ({"speculative_config": "{" * 4000}, "speculative_config"),
    ({"speculative_config": '{"method": ' + "[" * 3000}, "speculative_config"),
    ({"speculative_config": " " * 5000 + "{}"}, "has 5002 characters; at most 4096 are read"),
    ({"speculative_config": '{"method": "ngram", "method": "auto"}'}, "twice"),
    ({"speculative_config": '{"method": "ngram", "num_speculative_tokens": NaN}'}, "NaN"),
    ({"speculative_config": {}}, "speculative_config has no method and no model"),
    (config(method=None), "speculative_config has no method and no model"),
    (config(method=3), "speculative is 3; it must be a string"),
    (config(method="eagle", num_speculative_tokens=3), f"'eagle': {HEADS}"),
    (config(method="draft_model"), "the model of speculative_config is None; it must be a name"),
    (config(method="draft_model", model=3), "the model of speculative_config is 3"),
    (config(model="smaller"), "speculative_config has the method 'ngram', which has no model"),
    (config(numspeculative_tokens=3), "did you mean 'num_speculative_tokens'?"),
    (config(disable_by_batch_size=8), "drafts are verified only where they save time"),
    ({"speculative_config": {3: 4, "method": "ngram"}}, "no field of speculative_config 3"),
    (config(num_speculative_tokens=0), "num_speculative_tokens is 0"),
    (config(num_speculative_tokens="5"), "num_speculative_tokens is '5'"),
    (config(prompt_lookup_min=0), "prompt_lookup_min is 0; it must be a whole number"),
    (config(prompt_lookup_max="4"), "prompt_lookup_max is '4'; it must be a whole number"),
    (config(prompt_lookup_min=True), "prompt_lookup_min is True; it must be a whole number"),
    (
        config(prompt_lookup_min=5, prompt_lookup_max=3),
        "prompt_lookup_min is 5, and prompt_lookup_max only 3",
    ),
    (config() | {"speculative": "auto"}, "are the same option; give one of them"),
    (
        config(num_speculative_tokens=3) | {"num_speculative_tokens": 3},
        "num_speculative_tokens is given twice",
    ),
]


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_llm_refuses_in_one_sentence(options: Mapping[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence) as refusal:
        LLM(NOWHERE, **options)
    assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["ngrm", "eagle", "draft:"])
def test_a_config_that_is_built_by_hand_is_refused_too(name: str, tiny_path: Path) -> None:
    made = EngineConfig(speculative=name)
    with pytest.raises(ConfigError, match="speculati"):
        AsyncEngine.load(NOWHERE, made)
    with loader.open_model(tiny_path) as model, pytest.raises(ConfigError, match="speculati"):
        model.build_engine(made)
    assert not model._weights


ON_THE_COMMAND_LINE = [
    (options, sentence)
    for options, sentence in REFUSED
    if "speculative_config" not in options
    and isinstance(options.get("speculative"), str)
    and type(options.get("num_speculative_tokens", 0)) is int
]


@pytest.mark.parametrize(
    "words", [["run", "hi", "-m"], ["chat", "-m"], ["batch", "REQUESTS", "-m"], ["serve"]]
)
def test_commands_refuse_in_one_sentence(words: list[str], tmp_path: Path) -> None:
    if words[0] == "serve":
        pytest.importorskip("fastapi", reason="the server needs the extra 'server'")
    requests = tmp_path / "requests.jsonl"
    requests.write_text('{"prompt": "a"}\n')
    words = [str(requests) if word == "REQUESTS" else word for word in words]
    for options, sentence in ON_THE_COMMAND_LINE:
        if "max_num_batched_tokens" in options and words[0] in ("run", "chat"):
            continue  # they have no such option
        said = [
            part
            for name, value in options.items()
            for part in (f"--{name.replace('_', '-')}", str(value))
        ]
        result = CliRunner().invoke(main, [*words, NOWHERE, *said], input="hi\n")
        told = result.stderr.strip().splitlines()[-1]
        assert result.exit_code in (1, 2) and len(told) < 450, (said, result.output)
        with pytest.raises(ConfigError, match=sentence):
            raise ConfigError(told)


def test_wrong_types_on_the_command_line_are_refused() -> None:
    for value in ("three", "2.5", ""):
        words = ["run", "-m", NOWHERE, "--speculative=ngram", f"--num-speculative-tokens={value}"]
        result = CliRunner().invoke(main, [*words, "hi"])
        assert result.exit_code == 2 and "not a valid integer" in result.stderr
