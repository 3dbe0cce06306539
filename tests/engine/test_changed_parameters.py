"""What a caller changes after a request was built or while it runs reaches no request: a value that
became impossible is refused, and the requests beside it are answered.
"""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pellucid import LLM, AsyncEngine, EngineConfig, SamplingParams
from pellucid.errors import ConfigError, RequestError

CHANGES: list[tuple[str, Any]] = [
    ("temperature", -1),
    ("n", -1),
    ("n", 10**9),
    ("top_p", float("nan")),
    ("max_tokens", "4"),
    ("stop_token_ids", [-1]),
    ("logit_bias", {1: "x"}),
    ("logprobs", 10**6),
    ("seed", 1.5),
]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def changed(name: str, value: Any) -> SamplingParams:
    params = SamplingParams(max_tokens=4)
    setattr(params, name, value)
    return params


@pytest.fixture(scope="module")
def llm(tiny_path: Path) -> LLM:
    return LLM(tiny_path, backend="reference")


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_an_impossible_change_is_refused_and_others_run(llm: LLM, name: str, value: Any) -> None:
    expected = llm.generate("abc", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
    stream = llm.stream("abc", GREEDY)
    outputs = [next(stream)]
    with pytest.raises(ConfigError, match=rf"^sampling_params\[1\]: {name}"):
        llm.generate(["x", "y"], [GREEDY, changed(name, value)], use_tqdm=False)
    outputs += stream
    assert outputs[-1].outputs[0].token_ids == expected


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_an_impossible_change_is_refused_by_the_async_engine(
    tiny_path: Path, name: str, value: Any
) -> None:
    async def main() -> None:
        async with AsyncEngine.load(tiny_path, EngineConfig(backend="reference")) as engine:
            beside = engine.generate("abc", GREEDY)
            outputs = [await anext(beside)]
            with pytest.raises(ConfigError, match=f"^{name}"):
                await anext(engine.generate("x", changed(name, value)))
            outputs += [output async for output in beside]
            assert outputs[-1].outputs[0].finish_reason == "length"

    asyncio.run(main())


def test_a_list_that_holds_something_else_later_is_refused(llm: LLM) -> None:
    params = SamplingParams(stop=["x"])
    params.stop.append(5)  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"^stop\[1\] is 5; it must be a string"):
        llm.generate("abc", params, use_tqdm=False)


def test_changes_while_a_request_runs_do_not_reach_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[])
    ids = [97, 98, 99]
    expected = llm.generate([ids], params, use_tqdm=False)[0].outputs[0].token_ids
    stream = llm.stream(ids, params)
    outputs = [next(stream)]
    params.max_tokens = 1
    params.stop_token_ids.extend(expected)  # type: ignore[union-attr]
    ids.clear()
    outputs += stream
    last = outputs[-1]
    assert (last.prompt_token_ids, last.outputs[0].token_ids) == ([97, 98, 99], expected)


@pytest.mark.parametrize("wrong", [{"temperature": 0}, "greedy", 5, {"a": 1}.items()])
def test_sampling_params_of_another_type_are_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^sampling_params"):
        llm.generate("abc", wrong, use_tqdm=False)
    with pytest.raises(ConfigError, match=r"^sampling_params"):
        next(llm.stream("abc", wrong))


def test_there_is_one_for_all_or_one_for_each(llm: LLM) -> None:
    several: list[Any] = [[GREEDY] * 2, (GREEDY, GREEDY), iter([GREEDY] * 2)]
    for params in several:
        assert len(llm.generate(["a", "b"], params, use_tqdm=False)) == 2
    for count in (0, 1, 3):
        with pytest.raises(RequestError, match=f"^{count} sampling_params are given for 2 pro"):
            llm.generate(["a", "b"], [GREEDY] * count, use_tqdm=False)
