"""`pellucid quantize --target-bpw X` and `--type-map auto`: the options that let measured damage
choose the formats of tensors.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .terminal import progress_bar, say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from ..quant.auto_types import AutoTypes
    from ..quant.source import Source
    from ..quant.type_map import FileType, Rule

__all__ = ["AUTO", "check_auto_options", "choose_auto", "type_map_lines"]

AUTO = "auto"  # the word that stands in the place of a type map's file


def check_auto_options(
    file_type: "FileType | None",
    type_map: Path | None,
    target_bpw: float | None,
    calibration: str | None,
) -> bool:
    """Whether formats are chosen by damage. Raises ConfigError for options that contradict each
    other, or if one that is needed is missing.
    """
    from ..quant.type_map import DENSE

    automatic = target_bpw is not None or str(type_map) == AUTO
    if not automatic:
        if file_type is None:
            raise ConfigError("neither --to nor --target-bpw is given; one of them is needed")
        return False
    asked = "--type-map auto" if target_bpw is None else "--target-bpw"
    if target_bpw is None and file_type is None:
        raise ConfigError("--type-map auto needs a size: give --target-bpw, or --to TYPE for its")
    if target_bpw is not None and file_type is not None:
        raise ConfigError("--to and --target-bpw are both given, and each sets the size; leave one")
    if target_bpw is not None and not (math.isfinite(target_bpw) and target_bpw > 0):
        raise ConfigError(f"--target-bpw is {target_bpw:g}; it must be a positive number of bits")
    if file_type is not None and file_type.base in DENSE:
        raise ConfigError(
            f"--type-map auto chooses among formats of fewer bits, and --to {file_type.name} has "
            "none; give a type such as q4_k_m"
        )
    if calibration is None:
        raise ConfigError(f"{asked} measures damage on a text; give --calibration")
    return True


def choose_auto(
    source: "Source",
    windows: "NDArray[np.int32]",
    file_type: "FileType | None",
    target_bpw: float | None,
    rules: "Sequence[Rule]",
    *,
    allow_requantize: bool,
) -> "AutoTypes":
    """The formats of all tensors. `rules` decide for some of them."""
    from ..backends.native.backend import available_cpus
    from ..quant.auto_types import MAX_WINDOWS, choose_types, plan_budget
    from ..quant.encode import Encoder
    from ..quant.quantize import plan_quantization

    # how many bytes there are
    if file_type is not None:
        plan = plan_quantization(
            source, file_type, is_calibrated=True, allow_requantize=allow_requantize
        )
        num_bytes, num_weights = plan.num_bytes, plan.num_weights
        what = f"--to {file_type.name} has {8 * num_bytes / num_weights:.2f} bits per weight"
    else:
        assert target_bpw is not None
        num_weights = sum(math.prod(spec.shape) for spec in source.specs.values())
        num_bytes = int(target_bpw * num_weights / 8)
        what = f"--target-bpw is {target_bpw:g}"
    budget = plan_budget(source, num_bytes, what, rules, allow_requantize=allow_requantize)
    # measure, and choose
    tokens = min(MAX_WINDOWS, len(windows)) * windows.shape[1]
    say(f"measuring what formats cost, on {tokens} tokens")
    with progress_bar(total=source.config.num_layers, unit="layer") as bar:
        auto = choose_types(
            source,
            budget,
            windows,
            Encoder(available_cpus()).encode,
            on_layer=lambda: bar.update(1),
        )
    say(f"estimated KL divergence of the choice: {auto.damage:.3g} nats per token")
    return auto


def type_map_lines(auto: "AutoTypes | None") -> dict[str, Any]:
    """What the report says of the choice: lines for --type-map FILE."""
    if auto is None:
        return {}
    return {
        "estimated_kl": auto.damage,
        "type_map": [f"{rule.pattern.pattern}={rule.format}" for rule in auto.rules],
    }
