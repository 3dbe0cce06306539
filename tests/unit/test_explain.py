"""Why a request took as long as it did, from its times and from ceilings that are round numbers."""

from collections.abc import Mapping

import pytest

from pellucid.backends.native.backend import NativeBackend
from pellucid.backends.native.costs import StepShape
from pellucid.config import ModelConfig
from pellucid.errors import ConfigError
from pellucid.formats.tensor import TensorSpec
from pellucid.measure.explain import explain_request
from pellucid.measure.hardware import Ceilings, Range
from pellucid.measure.roofline import ModelProgram, build_model_program, total
from pellucid.models.registry import get_graph
from pellucid.outputs import CompletionOutput, RequestMetrics, RequestOutput

CONFIG = ModelConfig(
    architecture="llama",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
)
RATE = Range(1e9, 1e9, 1e9, 1)
CEILINGS = Ceilings("a device", "measured", {1 << 30: RATE}, {"int8": 1e10, "float32": 1e10})


@pytest.fixture(scope="module")
def program() -> ModelProgram:
    specs: Mapping[str, TensorSpec] = {
        param.name: TensorSpec("Q8_0" if len(param.shape) == 2 else "F32", param.shape)
        for param in get_graph("llama").parameters(CONFIG)
    }
    return build_model_program(CONFIG, specs, NativeBackend(threads=1), ("f16", "f16"))


def output(answer: int, cached: int = 0, **times: float) -> RequestOutput:
    return RequestOutput(
        request_id="a",
        prompt=None,
        prompt_token_ids=[1] * 300,
        outputs=[CompletionOutput(0, "", [2] * answer)],
        finished=True,
        metrics=RequestMetrics(**times),
        num_cached_tokens=cached,
    )


def test_the_phases_are_told_with_what_binds_them(program: ModelProgram) -> None:
    done = output(
        51,
        cached=100,
        arrival_time=0.0,
        first_scheduled_time=0.5,
        first_token_time=1.5,
        last_token_time=3.5,
    )
    found = explain_request(done, program, CEILINGS, chunk=512)
    assert found.time_in_queue == 0.5 and found.num_cached_tokens == 100
    assert (found.prefill.num_tokens, found.prefill.seconds) == (200, 1.0)
    assert found.prefill.bound == "arithmetic"
    assert found.decode is not None
    assert (found.decode.num_tokens, found.decode.seconds) == (50, 2.0)
    assert found.decode.bound == "memory"
    # nearly all of a step of decode is reading, at 1 GB/s
    moved = total(program.costs(StepShape((1,), (325,), 1))).bytes
    assert found.decode.roof_share == pytest.approx(50 * moved / 1e9 / 2.0, rel=0.1)
    sentence = found.sentence
    assert sentence.startswith("3.50 s: 57% decode (50 tokens), bound by memory and at ")
    assert "29% prefill (200 tokens, 100 more from the cache), bound by arithmetic" in sentence
    assert sentence.endswith("14% waiting in the queue")


def test_an_answer_of_one_token_has_no_decode(program: ModelProgram) -> None:
    done = output(
        1, arrival_time=0.0, first_scheduled_time=0.0, first_token_time=1.0, last_token_time=1.0
    )
    found = explain_request(done, program, CEILINGS, chunk=128)
    assert found.decode is None and found.prefill.num_tokens == 300


def test_a_request_without_a_token_has_no_explanation(program: ModelProgram) -> None:
    with pytest.raises(ConfigError, match="request a gave no token"):
        explain_request(output(0, arrival_time=0.0), program, CEILINGS, chunk=128)
