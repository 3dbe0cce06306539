"""The exactness matrix: every way to run a request gives the same bits, on a tiny Llama and on a
tiny Gemma with sliding windows; and where one did not, it would be said."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pellucid.backends.host_logits import HostLogits
from pellucid.backends.native.program import CapturedForward
from pellucid.batch import ForwardBatch
from pellucid.cli.main import main
from pellucid.engine.loader import open_model
from pellucid.errors import ConfigError
from pellucid.kv.manager import KVCacheManager
from pellucid.measure.verify import SETTINGS, Outcome, Verification, build_probes

from .conftest import write_tiny

HEAD_DIM = 32  # the least that int4 takes
WINDOW = 24  # tokens: less than most prompts have, more than one block


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    windows = [WINDOW, 0, WINDOW] if request.param == "gemma3" else []
    return write_tiny(
        tmp_path_factory.mktemp("verify") / f"{request.param}.gguf",
        request.param,
        256,
        windows,
        HEAD_DIM,
    )


@pytest.fixture(scope="module")
def llama_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("verify") / "llama.gguf"
    return write_tiny(path, context=256, head_dim=HEAD_DIM)


def _run(path: Path, names: Sequence[str]) -> list[Outcome]:
    with open_model(path) as model:
        return list(
            Verification(model).run([setting for setting in SETTINGS if setting.name in names])
        )


@pytest.mark.slow
def test_the_whole_matrix_is_exact(model_path: Path) -> None:
    with open_model(model_path) as model:
        outcomes = list(Verification(model).run())
    assert [(o.setting.name, o.difference, o.missing) for o in outcomes] == [
        (s.name, None, None) for s in SETTINGS
    ]
    for outcome in outcomes:
        # one of them is drawn twice
        assert outcome.num_requests == 8 and outcome.num_tokens == 9 * 24
        assert (outcome.num_preemptions > 0) == (outcome.setting.preemption is not None)
        assert (outcome.num_loaded_blocks > 0) == (outcome.setting.preemption == "swap")
        assert outcome.num_accepted_tokens <= outcome.num_draft_tokens
        assert (outcome.num_draft_tokens > 0) == (outcome.setting.speculative is not None)
        assert (outcome.num_cached_tokens > 0) == outcome.setting.cache


@pytest.mark.slow
def test_a_command_prints_the_table_and_ends_well(llama_path: Path) -> None:
    result = CliRunner().invoke(main, ["verify", str(llama_path)])
    assert result.exit_code == 0, result.output
    assert (
        result.stdout.count("identical") == len(SETTINGS)
        and "all gave the same bits" in result.stdout
    )


@pytest.mark.slow
def test_a_number_that_depends_on_the_batch_is_found(
    llama_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact: Callable[[CapturedForward, ForwardBatch], HostLogits] = CapturedForward.__call__

    def noisy(self: CapturedForward, batch: ForwardBatch) -> HostLogits:
        logits = exact(self, batch)
        if len(batch.attention.seq_lens) > 3:
            # one unit in the last place
            return HostLogits(np.nextafter(logits.to_host(), np.float32(np.inf)))
        return logits

    monkeypatch.setattr(CapturedForward, "__call__", noisy)
    result = CliRunner().invoke(main, ["verify", str(llama_path), "--json"])
    assert result.exit_code == 1, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    assert not found["exact"]
    wrong = {
        row["setting"]["name"]: row["difference"] for row in found["settings"] if row["difference"]
    }
    assert {
        "together",
        *(f"KV in {dtype}: chunks of 16" for dtype in ("f32", "int8", "int4", "int8,int4")),
    } <= wrong.keys()
    assert "one at a time" not in wrong
    assert all("token" in difference for difference in wrong.values())


def test_a_prefix_that_is_not_the_requests_own_is_found(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hit that is taken for one token longer than it is: that token's keys and values are
    another's.
    """
    lookup = KVCacheManager.lookup

    def generous(self: KVCacheManager, request: Any, *, whole_blocks: bool = False) -> Any:
        hit = lookup(self, request, whole_blocks=whole_blocks)
        if hit.match.partial is not None and hit.num_tokens + 2 < request.num_tokens:
            hit.num_tokens += (
                hit.num_tokens % self.layout.block_size != 0
                and (hit.num_tokens + 1) % self.layout.block_size != 0
            )
        return hit

    monkeypatch.setattr(KVCacheManager, "lookup", generous)
    (outcome,) = _run(model_path, ["one at a time"])
    assert (
        outcome.difference is not None and "token" in outcome.difference and not outcome.is_proven
    )


def test_a_setting_that_did_not_do_what_it_is_there_for_is_no_proof(model_path: Path) -> None:
    with open_model(model_path) as model:
        verification = Verification(model)
        # alone it is neither preempted nor does it hit
        verification.probes = verification.probes[:1]
        calm = [s for s in SETTINGS if s.name in ("preempted, recomputed", "together")]
        outcomes = list(verification.run(calm))
    assert [(o.difference, o.missing) for o in outcomes] == [
        (None, "no prefix was hit"),
        (None, "nobody was preempted"),
    ]
    assert not any(outcome.is_proven for outcome in outcomes)


def test_engines_of_one_model_share_its_weights(model_path: Path) -> None:
    with open_model(model_path) as model:
        first, second = (
            model.build_engine(
                replace(Verification(model)._config(SETTINGS[0]), backend_options={"threads": n})
            )
            for n in (1, 2)
        )
        assert len(model._weights) == 1 and first.core is not second.core


def test_answers_of_each_kv_cache_dtype_are_its_own(model_path: Path) -> None:
    """Else a dtype that is not heeded would pass its settings."""
    with open_model(model_path) as model:
        verification = Verification(model)
        dtypes = sorted({setting.kv_cache_dtype for setting in verification.settings})
        outputs = [verification.expected(dtype) for dtype in dtypes]
    assert (
        dtypes == ["f16", "f32", "int4", "int8", "int8,int4"]
        and set(dtypes) == verification.plain_seconds.keys()
    )
    logprobs = [repr([output.outputs[0].logprobs for output in outs]) for outs in outputs]
    assert len(set(logprobs)) == len(dtypes)


def test_heads_that_int4_cannot_keep_are_verified_in_what_can(tiny_path: Path) -> None:
    with open_model(write_tiny(tiny_path.with_name("narrow.gguf"), context=256)) as model:
        assert {setting.kv_cache_dtype for setting in Verification(model).settings} == {
            "f16",
            "f32",
            "int8",
        }


def test_a_model_of_a_short_context_is_refused(tmp_path: Path) -> None:
    with (
        open_model(write_tiny(tmp_path / "short.gguf", context=80)) as model,
        pytest.raises(ConfigError, match=r"80 tokens.*at least 88"),
    ):
        build_probes(model)
