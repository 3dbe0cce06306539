"""FLOPs and bytes, counted by hand for shapes small enough to count."""

from typing import Any

import pytest

from pellucid.ops import cost
from pellucid.ops.case_lists import CASES
from pellucid.ops.cost import OpCost, visible_pairs


def test_linear_of_one_token_reads_each_weight_once() -> None:
    # 3 outputs of 2 multiply-adds each: 12 FLOPs. Reads 6 weights and 2 activations, writes 3
    # numbers, 4 bytes each.
    assert cost.linear(1, 2, 3) == OpCost(12, 32, 12)


def test_linear_with_bias_adds_one_flop_and_reads_one_number_per_output() -> None:
    assert cost.linear(2, 2, 3, bias=True) == OpCost(2 * 12 + 6, 24 + 16 + 12, 24)


def test_linear_counts_the_packed_weight() -> None:
    # Q4_K packs 256 numbers in 144 bytes: a row of 512 is 288.
    assert cost.linear(1, 512, 10, format="Q4_K") == OpCost(2 * 5120, 10 * 288 + 512 * 4, 40)
    # Q8_0 packs 32 numbers in 34 bytes.
    assert cost.linear(4, 64, 10, format="Q8_0") == OpCost(4 * 2 * 640, 10 * 68 + 4 * 64 * 4, 160)


def test_intensity_of_linear_grows_with_the_tokens_that_share_a_weight() -> None:
    one, many = cost.linear(1, 4096, 4096, format="F16"), cost.linear(512, 4096, 4096, format="F16")
    assert one.arithmetic_intensity == pytest.approx(1.0, rel=0.01)  # 2 FLOPs for 2 bytes of weight
    assert many.arithmetic_intensity > 200 * one.arithmetic_intensity


def test_embedding_reads_the_rows_it_takes() -> None:
    assert cost.embedding(3, 64, format="Q8_0") == OpCost(0, 3 * 68, 3 * 256)
    assert cost.embedding(3, 64, scaled=True) == OpCost(192, 768, 768)


def test_norms_and_activations() -> None:
    # 2 rows of 4: x² · 8, sum · 8, divide · 8, weight · 8, and mean, eps, sqrt for each row; reads
    # x and the weight
    assert cost.rms_norm(2, 4) == OpCost(32 + 6, 32 + 16, 32)
    assert cost.layer_norm(2, 4) == OpCost(56 + 8, 32 + 32, 32)
    assert cost.add(2, 4) == OpCost(8, 64, 32)
    assert cost.silu_mul(2, 4) == OpCost(8 * 5, 64, 32)  # exp, +, /, and two products
    assert cost.gelu_mul(2, 4).flops == cost.gelu(2, 4).flops + 8
    assert cost.softcap(2, 4) == OpCost(24, 32, 32)
    assert cost.take_rows(2, 4) == OpCost(0, 32, 32)


def test_what_moves_nothing_costs_nothing() -> None:
    assert cost.split_heads() == cost.all_reduce(5, 7) == OpCost(0, 0, 0)
    assert cost.split_heads().arithmetic_intensity == 0.0


def test_all_reduce_adds_the_parts_of_the_other_ranks() -> None:
    assert cost.all_reduce(2, 4, ranks=3) == OpCost(16, 3 * 32, 32)


def test_rope_turns_pairs() -> None:
    # 1 token, 2 heads of 4, all turning: 2 pairs. Each: angle, cos, sin, 2 scalings; in each head 4
    # products and 2 sums.
    assert cost.rope(1, 2, 4, 4) == OpCost(2 * (5 + 12), 32 + 8, 32)


def test_kv_write_moves_keys_and_values() -> None:
    assert cost.kv_write(3, 2, 8) == OpCost(0, 384, 384)
    assert cost.kv_write(3, 2, 8, kv_token_bytes=64) == OpCost(0, 384, 192)


@pytest.mark.parametrize("q_len", range(1, 9))
@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 8, 9, 20])
def test_visible_pairs_are_those_of_the_mask(q_len: int, window: int | None) -> None:
    for seq_len in range(q_len, 12):
        pairs = sum(
            1
            for i in range(seq_len - q_len, seq_len)
            for j in range(seq_len)
            if j <= i and (window is None or j > i - window)
        )
        assert visible_pairs(q_len, seq_len, window) == pairs


def test_attention_of_one_token() -> None:
    # 2 heads over 1 key head of 4 numbers, 3 keys: 6 pairs of 8 (q·k) + 1 (scale) + 4 (softmax) + 8
    # (p·v), 8 divisions.
    tiny = cost.attention([1], [3], num_heads=2, num_kv_heads=1, head_dim=4)
    assert tiny == OpCost(6 * 21 + 8, 32 + 2 * 3 * 4 * 4, 32)


def test_attention_of_a_prompt_is_half_a_square() -> None:
    # 4 queries over 4 keys: 10 visible pairs
    assert (
        cost.attention([4], [4], num_heads=1, num_kv_heads=1, head_dim=2).flops
        == 10 * (4 + 1 + 4 + 4) + 8
    )


def attention(q_lens: list[int], seq_lens: list[int], **options: Any) -> OpCost:
    return cost.attention(q_lens, seq_lens, num_heads=2, num_kv_heads=2, head_dim=4, **options)


def test_attention_counts_requests_apart_and_a_window_bounds_what_is_read() -> None:
    assert attention([2, 1], [5, 9]) == attention([2], [5]) + attention([1], [9])
    # 2 queries at positions 7 and 8 with a window of 3 see keys 5 … 8, of 3 pairs each
    windowed = attention([2], [9], window=3)
    assert windowed.bytes_read == 2 * 8 * 4 + 2 * 4 * 8 * 4
    assert windowed.flops == 2 * 6 * (8 + 1 + 4 + 8) + 16


def test_softcap_costs_three_flops_per_score_and_small_kv_elements_save_bytes() -> None:
    plain = attention([1], [10])
    assert attention([1], [10], softcap=True).flops == plain.flops + 2 * 30  # 2 heads
    # 10 keys and values of 2 · 4 numbers
    assert attention([1], [10], kv_token_bytes=16).bytes_read == plain.bytes_read - 3 * 160


def test_every_case_knows_its_cost() -> None:
    for case in CASES:
        assert case.cost.flops >= 0 and case.cost.bytes_read >= 0 and case.cost.bytes_written >= 0
        if case.op in ("linear", "attention") and "rows=[]" not in case.name:
            assert case.cost.flops > 0 and case.cost.arithmetic_intensity > 0
