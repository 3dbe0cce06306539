"""A real model is exact where it is most likely not to be: preempted, swapped, in small chunks,
beside others.
"""

from collections.abc import Callable
from pathlib import Path

from pellucid.engine.loader import open_model
from pellucid.measure.verify import SETTINGS, Verification


def test_preemption_swapping_chunks_and_neighbours_change_no_bit_of_a_real_model(
    real_model: Callable[[str], Path],
) -> None:
    settings = [
        s
        for s in SETTINGS
        if s.name in ("together", "preempted, recomputed")
        or "staggered, swapped" in s.name
        or s.name.startswith("worst")
    ]
    with open_model(real_model("smollm2-135m-instruct-q4_1")) as model:
        outcomes = list(Verification(model).run(settings))
    assert len(outcomes) == 10  # in every KV cache dtype
    assert [(o.setting.name, o.difference, o.missing) for o in outcomes if not o.is_proven] == []
