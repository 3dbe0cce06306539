"""Figures of a load test, against ones worked out by hand."""

import math

import pytest

from pellucid.errors import ConfigError
from pellucid.measure.load_statistics import (
    RequestRecord,
    parse_goodput,
    parse_names,
    parse_percentiles,
    peak_concurrency,
    summarize,
)


def answered(index: int, sent: float, *chunks: tuple[float, int]) -> RequestRecord:
    """A request whose chunks (seconds after sending, tokens) came."""
    return RequestRecord(
        index,
        sent,
        sent,
        end=sent + chunks[-1][0],
        chunk_times=[sent + time for time, _ in chunks],
        chunk_tokens=[count for _, count in chunks],
        input_tokens=10,
        output_tokens=sum(count for _, count in chunks),
    )


def failed(index: int, sent: float, kind: str = "HTTP 500") -> RequestRecord:
    return RequestRecord(index, sent, sent, end=sent + 9, error="broken", error_kind=kind)


def test_times_of_a_request_are_those_of_its_chunks() -> None:
    record = answered(0, 5.0, (0.5, 1), (0.7, 1), (1.3, 3))
    assert record.ttft == pytest.approx(0.5)
    assert record.e2el == pytest.approx(1.3)
    assert record.tpot == pytest.approx(0.8 / 4)
    assert record.itls() == pytest.approx([0.2, 0.2, 0.2, 0.2])


def test_a_first_chunk_of_several_tokens_does_not_make_the_later_ones_faster() -> None:
    # 3 tokens at once, then one every 100 ms: 100 ms per token, not 2 · 100 / 4
    record = answered(0, 0.0, (1.0, 3), (1.1, 1), (1.2, 1))
    assert record.tpot == pytest.approx(0.1)
    assert record.itls() == pytest.approx([0.1, 0.1])


def test_one_chunk_has_a_ttft_and_no_time_per_token() -> None:
    found = summarize([answered(0, 0.0, (0.25, 4))], 1.0)
    assert found["mean_ttft_ms"] == pytest.approx(250)
    assert found["mean_tpot_ms"] is None and found["p99_itl_ms"] is None


def test_means_medians_and_percentiles_by_hand() -> None:
    # TTFT 100, 200, 300, 400 ms
    records = [answered(i, float(i), (0.1 * (i + 1), 1), (0.1 * (i + 1) + 1, 2)) for i in range(4)]
    found = summarize(records, 8.0, percentiles=(50, 90, 99))
    assert found["mean_ttft_ms"] == pytest.approx(250)
    assert found["median_ttft_ms"] == found["p50_ttft_ms"] == pytest.approx(250)
    assert found["std_ttft_ms"] == pytest.approx(100 * math.sqrt(5) / 2)
    assert found["p90_ttft_ms"] == pytest.approx(370)  # 0.9 · 3 = 2.7 → 300 + 0.7 · 100
    assert found["p99_ttft_ms"] == pytest.approx(397)
    assert found["mean_tpot_ms"] == pytest.approx(500)
    assert found["request_throughput"] == pytest.approx(0.5)
    assert found["output_throughput"] == pytest.approx(12 / 8)
    assert found["total_token_throughput"] == pytest.approx(52 / 8)


def test_failed_requests_are_counted_by_kind_and_are_in_no_other_figure() -> None:
    records = [answered(0, 0.0, (0.1, 1), (0.2, 1)), failed(1, 0.0), failed(2, 0.0, "timeout")]
    records.append(failed(3, 0.0, "timeout"))
    found, alone = summarize(records, 2.0), summarize(records[:1], 2.0)
    assert (found["completed"], found["failed"]) == (1, 3)
    assert found["errors"] == {"timeout": 2, "HTTP 500": 1}
    different = {"failed", "errors", "max_concurrent_requests"}
    assert {k: v for k, v in found.items() if k not in different} == {
        k: v for k, v in alone.items() if k not in different
    }


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    records = [
        answered(0, 0.0, (0.1, 1), (0.15, 1)),  # 100 ms, 50 ms per token
        answered(1, 0.0, (0.1, 1), (0.20, 1)),  # the second token is late
        answered(2, 0.0, (0.6, 1), (0.61, 1)),  # the first is late
        answered(3, 0.0, (0.5, 1)),  # exactly the limit; nothing came after
        failed(4, 0.0),
    ]
    limits = parse_goodput(("ttft:500 tpot:60",))
    assert limits == {"ttft": 500, "tpot": 60}
    assert summarize(records, 2.0, goodput=limits)["request_goodput"] == pytest.approx(2 / 2)
    assert "request_goodput" not in summarize(records, 2.0)


def test_concurrency_counts_who_is_with_the_server_at_one_moment() -> None:
    records = [answered(0, 0.0, (1.0, 1)), answered(1, 0.5, (1.0, 1)), answered(2, 1.0, (1.0, 1))]
    assert peak_concurrency(records) == 2  # the third is sent as the first ends
    assert peak_concurrency([]) == 0


def test_nothing_measured_is_no_crash() -> None:
    found = summarize([], 0.0)
    assert found["completed"] == 0 and found["mean_e2el_ms"] is None


def test_tokens_without_usage_are_told_as_chunks() -> None:
    counted, uncounted = answered(0, 0.0, (1.0, 1)), answered(1, 0.0, (1.0, 1))
    uncounted.is_counted = False
    assert summarize([counted], 1.0)["tokens_counted_by"] == "usage"
    assert summarize([uncounted], 1.0)["tokens_counted_by"] == "chunks"
    assert summarize([counted, uncounted], 1.0)["tokens_counted_by"] == "usage and chunks"


@pytest.mark.parametrize("text", ["ttft", "ttft:", "ttft:x", "itl:5", "ttft:0", "ttft:-1", ":5"])
def test_a_wrong_goodput_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--goodput has .* must be NAME:MILLISECONDS"):
        parse_goodput((text,))


def test_a_limit_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="limits ttft twice"):
        parse_goodput(("ttft:1", "ttft:2"))


def test_names_and_percentiles_are_checked() -> None:
    assert parse_names("e2el, ttft") == ["ttft", "e2el"]
    assert parse_percentiles("99,50,99.9") == [50, 99, 99.9]
    with pytest.raises(ConfigError, match="the names are: ttft, tpot, itl, e2el"):
        parse_names("ttft,speed")
    for text in ("", "101", "-1", "nan", "a"):
        with pytest.raises(ConfigError, match="numbers of 0 to 100"):
            parse_percentiles(text)
