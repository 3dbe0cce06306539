"""Constrained output: every answer that ends by itself is valid, and batching, preemption and
drafts change none. The model is random, so nothing but the constraint makes an answer valid.
"""

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llguidance", reason="constrained output needs the extra 'structured'")

from pellucid import LLM, EngineConfig, PellucidError, SamplingParams, StructuredOutputsParams
from pellucid.engine.admission import Submission
from pellucid.engine.core import EngineCore
from pellucid.engine.loader import OpenModel, open_model
from pellucid.engine.prompts import TokenizedPrompt
from pellucid.request import Request
from pellucid.structured import GrammarCompiler

from .drafting import drafting_core

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 200},
        "tags": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CHOICES = ["yes", "no (maybe)", 'quo"te\n', "é.*"]
GRAMMAR = 'root ::= "[" item ("," item)? "]"\nitem ::= [0-9]'


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        person.keys() == {"name", "age", "tags"}
        and re.fullmatch("[a-z]{1,5}", person["name"]) is not None
        and 0 <= person["age"] <= 200
        and set(person["tags"]) <= {"a", "bc"}
    )


CASES: dict[str, tuple[dict[str, Any], Any]] = {
    "json": ({"json": SCHEMA}, is_person),
    "json as text": ({"json": json.dumps(SCHEMA)}, is_person),
    "regex": ({"regex": r"[A-C]{2}\d+(x|é)"}, re.compile(r"[A-C]{2}\d+(x|é)").fullmatch),
    "choice": ({"choice": CHOICES}, CHOICES.__contains__),
    "grammar": ({"grammar": GRAMMAR}, re.compile(r"\[\d(,\d)?\]").fullmatch),
    "lark": ({"grammar": 'start: "a"+ "b"'}, re.compile("a+b").fullmatch),
    "json_object": ({"json_object": True}, lambda text: isinstance(json.loads(text), dict)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_ends_by_itself_is_valid(tiny: LLM, case: str) -> None:
    fields, is_valid = CASES[case]
    wanted = StructuredOutputsParams(**fields)
    params = [
        SamplingParams(
            temperature=t, seed=seed, max_tokens=100, structured_outputs=wanted, ignore_eos=eos
        )
        for seed in range(4)
        for t, eos in ((0.0, False), (1.0, True), (1.5, False))
    ]
    outputs = tiny.generate(["A "] * len(params), params, use_tqdm=False)
    reasons = [output.outputs[0].finish_reason for output in outputs]
    assert set(reasons) <= {"stop", "length"}
    assert "stop" in reasons or case == "json_object"
    for output in outputs:
        if output.outputs[0].finish_reason == "stop":
            assert is_valid(output.outputs[0].text), output.outputs[0].text


def test_logprobs_are_those_of_the_model(tiny: LLM) -> None:
    free, bound = tiny.generate(
        ["A ", "A "],
        [
            SamplingParams(max_tokens=1, logprobs=-1, temperature=0),
            SamplingParams(
                max_tokens=1,
                logprobs=2,
                temperature=0,
                structured_outputs=StructuredOutputsParams(choice=["q"]),
            ),
        ],
        use_tqdm=False,
    )
    assert bound.outputs[0].text == "q"
    assert free.outputs[0].logprobs is not None and bound.outputs[0].logprobs is not None
    for token, entry in bound.outputs[0].logprobs[0].items():
        assert free.outputs[0].logprobs[0][token] == entry


def test_each_of_n_has_its_own_state(tiny: LLM) -> None:
    params = SamplingParams(
        n=4, seed=1, max_tokens=80, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    outputs = tiny.generate("A ", params, use_tqdm=False)[0].outputs
    assert len({output.text for output in outputs}) > 1
    assert all(is_person(o.text) for o in outputs if o.finish_reason == "stop")


# ---- batching, preemption, drafts


@pytest.fixture(scope="module")
def model(tiny_path: Path) -> Iterator[OpenModel]:
    with open_model(tiny_path) as opened:
        yield opened


class Guesses:
    """Drafts the right answer with mistakes in it."""

    def __init__(self, answers: dict[str, list[int]], rng: random.Random) -> None:
        self._answers, self._rng = answers, rng

    def __call__(self, requests: Any) -> dict[str, list[int]]:
        return {request.request_id: self._draft(request) for request in requests}

    def _draft(self, request: Request) -> list[int]:
        given = len(request.output_token_ids)
        drafts = self._answers[request.request_id][given : given + self._rng.randint(0, 6)]
        drafts += [self._rng.randrange(261) for _ in range(self._rng.randint(0, 2))]
        if drafts and self._rng.random() < 0.4:
            drafts[self._rng.randrange(len(drafts))] = self._rng.randrange(261)
        return drafts


def submissions(compiler: GrammarCompiler, rng: random.Random) -> list[Submission]:
    found = []
    for i in range(6):
        fields, _ = rng.choice(list(CASES.values()))
        params = SamplingParams(
            temperature=rng.choice((0.0, 1.0)),
            seed=rng.randrange(1 << 30),
            max_tokens=rng.randint(1, 40),
            logprobs=rng.choice((None, 1)),
            structured_outputs=rng.choice((None, StructuredOutputsParams(**fields))),
        )
        prompt = TokenizedPrompt([rng.randrange(256) for _ in range(rng.randint(1, 20))], None)
        found.append(Submission(f"r{i}", prompt, params, compiler.constraint(params)))
    return found


def run(core: EngineCore, asked: list[Submission]) -> dict[str, Any]:
    core.add_requests(asked)
    done = {}
    while core.has_unfinished:
        for output in core.step():
            done[output.request_id] = output.outputs
        core.scheduler.check_integrity()
    return done


@pytest.mark.parametrize("seed", range(6))
def test_batches_preemptions_and_drafts_change_nothing(model: OpenModel, seed: int) -> None:
    rng = random.Random(seed)
    asked = submissions(GrammarCompiler(model.tokenizer), rng)
    # alone, one after the other
    config = EngineConfig(max_model_len=64, kv_cache_memory=1 << 18, backend_options={"threads": 1})
    alone = model.build_engine(config).core
    expected = {}
    for submission in asked:
        expected.update(run(alone, [submission]))
    # together, with little memory and drafts
    layout = model.layout(config)
    blocks = layout.blocks_for(64, 16)
    crowded = replace(
        config,
        max_num_batched_tokens=16,
        enable_prefix_caching=False,
        preemption="recompute",
        kv_cache_memory=layout.bytes_per_block * (blocks + 2),
    )
    answers = {name: list(outputs[0].token_ids) for name, outputs in expected.items()}
    core = drafting_core(model, crowded, Guesses(answers, rng))
    assert run(core, asked) == expected
    assert core.stats().num_accepted_tokens > 0


# ---- bad input


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "has nothing; exactly one of json, regex, choice"),
        ({"regex": "a", "choice": ["b"]}, "has regex and choice; exactly one"),
        ({"regex": ""}, "structured_outputs.regex .* 1 to 65536 characters"),
        ({"regex": 5}, "structured_outputs.regex is 5; it must be a string"),
        ({"regex": "a" * 70_000}, "structured_outputs.regex .* 1 to 65536 characters"),
        ({"choice": []}, "structured_outputs.choice has 0 entries"),
        ({"choice": [""]}, r"structured_outputs.choice\[0\]"),
        ({"json": "{"}, "structured_outputs.json is not JSON"),
        ({"json": "[" * 100_000}, "structured_outputs.json has 100000 characters"),
        ({"json": "[" * 5_000}, "structured_outputs.json is not JSON"),
        ({"json": '{"maximum": NaN}'}, "NaN is not a number of JSON"),
        ({"json": deep(40)}, "nested more than 64 levels"),
        ({"json": {"a": object()}}, "structured_outputs.json is not JSON"),
        ({"json_object": 1}, "structured_outputs.json_object is 1; it must be True or False"),
    ],
)
def test_parameters_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PellucidError, match=says):
        StructuredOutputsParams(**fields)


def test_a_schema_that_holds_itself_is_refused() -> None:
    schema: dict[str, Any] = {}
    schema["a"] = schema
    with pytest.raises(PellucidError, match="nested more than 64 levels"):
        StructuredOutputsParams(json=schema)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"regex": "(a"}, "structured_outputs.regex cannot be compiled: .*unclosed group"),
        ({"regex": "(?=a)b"}, "structured_outputs.regex cannot be compiled: .*look-around"),
        ({"grammar": "root ::= foo"}, "structured_outputs.grammar cannot be compiled"),
        ({"grammar": "start: foo"}, "structured_outputs.grammar cannot be compiled: .*foo"),
        ({"json": {"type": "foo"}}, "structured_outputs.json cannot be compiled: .*foo"),
        ({"json": {"$ref": "http://localhost/x"}}, "structured_outputs.json cannot be compiled"),
        ({"json": {"not": {}}}, "structured_outputs.json cannot be compiled: .*not"),
        ({"json": {"enum": []}}, "structured_outputs.json cannot be compiled: .*[Uu]nsatisfiable"),
        ({"json": {"x-guidance": {}}}, "has the key 'x-guidance'"),
        ({"grammar": "root ::= root"}, "grammar cannot be compiled: no text matches it"),
        ({"grammar": "root ::= a\na ::= root"}, "grammar cannot be compiled: no text matches it"),
        ({"regex": r"[^\x00-\U0010FFFF]"}, "regex cannot be compiled: no text matches it"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_nothing_is_lost(
    tiny: LLM, fields: dict[str, Any], says: str
) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**fields))
    with pytest.raises(PellucidError, match=says):
        tiny.generate("A ", params, use_tqdm=False)
    again = tiny.generate("A ", SamplingParams(max_tokens=2), use_tqdm=False)
    assert again[0].outputs[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("regex", ["a{1000000}", "((((((a{99}){99}){99}){99}){99}){99})"])
def test_a_step_does_not_build_what_compiling_builds(model: OpenModel, regex: str) -> None:
    """In CPU time of this thread."""
    compiler = GrammarCompiler(model.tokenizer)
    compiler.compile(StructuredOutputsParams(regex="a"))  # reads the vocabulary
    start = time.thread_time()
    constraint = compiler.compile(StructuredOutputsParams(regex=regex))
    compiled = time.thread_time()
    constraint.masks([])
    assert time.thread_time() - compiled < (compiled - start) / 2


def test_a_grammar_that_takes_too_long_ends_alone(tiny: LLM) -> None:
    """Whatever the library makes of these, the request beside them gets its answer."""
    hostile = [
        {"grammar": 'start: "a" | start start start start'},
        {"regex": "(a|b|ab)*" * 500 + "c{5000}"},
        {"regex": r"(.{1,1000}){1,1000}"},
        {"json": {"type": "array", "minItems": 10**9}},
        {"json": {"$ref": "#"}},
        {"json": {"anyOf": [{"type": "string", "pattern": f"a{{{i}}}.*"} for i in range(500)]}},
    ]
    calm = SamplingParams(max_tokens=20, temperature=0)
    expected = tiny.generate("A ", calm, use_tqdm=False)[0].outputs[0]
    for fields in hostile:
        wanted = StructuredOutputsParams(**fields)  # type: ignore[arg-type]
        bound = SamplingParams(max_tokens=20, structured_outputs=wanted, seed=0)
        try:
            _, beside = tiny.generate(["A ", "A "], [bound, calm], use_tqdm=False)
        except PellucidError as error:
            assert "structured_outputs" in str(error)
        else:
            assert beside.outputs[0] == expected


def test_json_becomes_parameters() -> None:
    params = SamplingParams.from_optional(structured_outputs={"regex": "a+", "json": None})
    assert params.structured_outputs == StructuredOutputsParams(regex="a+")
    with pytest.raises(PellucidError, match="there is no field of structured_outputs 'reg'"):
        SamplingParams.from_optional(structured_outputs={"reg": "a+"})
    read = StructuredOutputsParams.from_response_format
    assert read({"type": "text"}) is None
    assert read({"type": "json_object"}) == StructuredOutputsParams(json_object=True)
    given = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    assert read(given) == StructuredOutputsParams(json=SCHEMA)
    for wrong in (
        {"type": "xml"},
        {"type": "json_schema"},
        "json",
        {"type": "json_schema", "json_schema": {"schema": None}},
    ):
        with pytest.raises(PellucidError, match="response_format"):
            read(wrong)


def test_without_the_library_one_sentence_says_what_to_install(tiny_path: Path) -> None:
    program = (
        "import sys; sys.modules['llguidance'] = None\n"
        "from pellucid import LLM, SamplingParams, StructuredOutputsParams\n"
        f"llm = LLM({str(tiny_path)!r})\n"
        "llm.generate('A', SamplingParams(structured_outputs=StructuredOutputsParams("
        "json_object=True)), use_tqdm=False)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "needs the package llguidance: pip install 'pellucid[structured]'" in done.stderr
