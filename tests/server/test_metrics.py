"""GET /metrics under vLLM's names, what it counts, and the dashboard that shows it."""

import asyncio
import json
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pellucid import SamplingParams
from pellucid.engine.async_engine import AsyncEngine
from pellucid.server.service import Service
from pellucid.server.settings import ServerSettings
from tests.server.conftest import Server, serving

DASHBOARD = Path(__file__).parents[2] / "docs" / "grafana.json"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

# as the parser names families: a counter without its "_total"
NAMES_OF_VLLM = {
    *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "num_preemptions"),
    *("prompt_tokens", "generation_tokens", "prompt_tokens_cached", "prefix_cache_queries"),
    *("prefix_cache_hits", "request_success", "admission_rejections"),
    *("spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    *("spec_decode_num_accepted_tokens", "spec_decode_num_accepted_tokens_per_pos"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("request_time_per_output_token_seconds", "e2e_request_latency_seconds"),
    *("request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens"),
    *("request_params_max_tokens", "request_params_n"),
}


@pytest.fixture(scope="module")
def measured(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own, whose counts nobody else adds to."""
    log = tmp_path_factory.mktemp("metrics") / "server.log"
    options = ("--served-model-name", "tiny", "--metrics-aliases", "vllm")
    with serving(tiny_model, log, *options) as running:
        yield running


def scrape(server: Server) -> str:
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        return str(response.read().decode())


def families(text: str) -> set[str]:
    return {family.name for family in text_string_to_metric_families(text)}


def samples(text: str) -> Samples:
    """Each sample by its name and its labels."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def changed(before: Samples, after: Samples, name: str) -> dict[tuple[str, ...], float]:
    """By how much the samples of a name grew, by their labels' values without the model's."""
    return {
        tuple(value for label, value in labels if label != "model_name"): value - before.get(key, 0)
        for key, value in after.items()
        if key[0] == name and value != before.get(key, 0)
        for labels in [key[1]]
    }


def test_names_are_vllms_under_both_prefixes(measured: Server, server: Server) -> None:
    ours, theirs = families(scrape(server)), families(scrape(measured))
    assert {f"pellucid:{name}" for name in NAMES_OF_VLLM} <= ours
    assert not any(name.startswith("vllm:") for name in ours)
    assert {f"vllm:{name}" for name in NAMES_OF_VLLM} <= theirs
    assert {name.partition(":")[2] for name in theirs if name.startswith("pellucid:")} == {
        name.partition(":")[2] for name in theirs if name.startswith("vllm:")
    }


def test_a_request_is_counted_once(measured: Server) -> None:
    before = samples(scrape(measured))
    measured.client().completions.create(model="tiny", prompt="abc", max_tokens=5, n=2)
    after = samples(scrape(measured))
    for prefix in ("pellucid:", "vllm:"):
        http = changed(before, after, f"{prefix}http_requests_total")
        assert http.pop(("POST", "/v1/completions", "200")) == 1
        assert http == {("GET", "/metrics", "200"): 1}
        ends = changed(before, after, f"{prefix}request_success_total")
        assert sum(ends.values()) == 2
        for name, total in (("params_n", 2), ("params_max_tokens", 5), ("prompt_tokens", 3)):
            assert changed(before, after, f"{prefix}request_{name}_count") == {(): 1}
            assert changed(before, after, f"{prefix}request_{name}_sum") == {(): total}
        assert changed(before, after, f"{prefix}request_inference_time_seconds_count") == {(): 1}


def test_each_request_is_explained_once_by_a_scrape(measured: Server) -> None:
    before = samples(scrape(measured))
    for _ in range(3):
        measured.client().completions.create(model="tiny", prompt="abc", max_tokens=5)
    after = samples(scrape(measured))
    bounds = changed(before, after, "pellucid:request_bound_total")
    assert sum(bounds.values()) == 3
    assert {bound for (bound,) in bounds} <= {"memory", "arithmetic", "queue", "unknown"}
    again = samples(scrape(measured))
    assert not changed(after, again, "pellucid:request_bound_total")


def test_labels_of_a_stranger_are_bounded(measured: Server) -> None:
    before = samples(scrape(measured))
    for path in ("/x", "/y", "/v1/models/a"):
        for method in ("GET", "PURGE"):
            request = urllib.request.Request(measured.url + path, method=method)
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request)
            caught.value.close()
    http = changed(before, samples(scrape(measured)), "pellucid:http_requests_total")
    assert {method for method, *_ in http} == {"GET", "other"}
    assert {route for _, route, _ in http} <= {"none", "/v1/models/{name:path}", "/metrics"}


def test_errors_are_counted_by_status(measured: Server) -> None:
    before = samples(scrape(measured))
    with pytest.raises(openai.NotFoundError):
        measured.client().completions.create(model="other", prompt="a")
    after = samples(scrape(measured))
    assert changed(before, after, "pellucid:request_errors_total") == {("404",): 1}
    assert not changed(before, after, "pellucid:admission_rejections_total")


def test_each_metric_of_the_dashboard_exists(server: Server) -> None:
    dashboard: Any = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel.get("targets", ())]
    asked += [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    text = scrape(server)
    known = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    histograms = set(re.findall(r"^# TYPE (\S+) histogram", text, re.MULTILINE))
    known |= {h + suffix for h in histograms for suffix in ("_bucket", "_sum", "_count")}
    used = {name for expr in asked for name in re.findall(r"pellucid:\w+", expr)}
    assert len(used) > 20
    assert used <= known, used - known
    places = [tuple(panel["gridPos"][key] for key in "xy") for panel in dashboard["panels"]]
    assert len(set(places)) == len(places)


def test_a_scrape_lets_others_run(tiny_model: Path) -> None:
    """The event loop runs between any two families of metrics, and between two explanations."""

    async def scrape() -> tuple[int, bytes]:
        engine = AsyncEngine.load(tiny_model)
        service = Service(engine, "tiny", ServerSettings(metrics_aliases="vllm"))
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        try:
            for _ in range(3):
                async for output in engine.generate("abc", SamplingParams(max_tokens=2)):
                    last = output
                service.metrics.finish(last, 2)
            others = asyncio.create_task(count_turns())
            text = await service.metrics.text()
            others.cancel()
        finally:
            await engine.close()
        return turns, text

    turns, text = asyncio.run(scrape())
    families = set(re.findall(rb"# TYPE pellucid:(\w+?)(?:_created|_total)? ", text))
    assert turns >= len(families) > 30
    assert text.count(b"# TYPE pellucid:") == text.count(b"# TYPE vllm:") > 30
