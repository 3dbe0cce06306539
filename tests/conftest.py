"""Fixtures for what a test may need and a machine may lack, and Hypothesis' settings for all tests.

A test is skipped where something is missing, and its reason says how to bring it. PELLUCID_MODELS
names a folder of .gguf files, PELLUCID_DATA a folder that holds wikitext-2/.
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test may fail because the machine is busy: examples have no deadline, and slow ones are no
# fault. HYPOTHESIS_PROFILE=fast (scripts/test --fast) tries fewer examples, and =repeatable
# (.ci/run) the same ones each time, so that a change is judged by itself and not by luck.
settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("fast", settings.get_profile("default"), max_examples=10)
settings.register_profile("repeatable", settings.get_profile("default"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

# A runner that was put into the background ignores Ctrl-C, and so would every program that a test
# starts and interrupts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _folder(variable: str, holds: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set; it names a folder that holds {holds}")
    folder = Path(value)
    assert folder.is_dir(), f"{variable} is {value!r}, which is not a folder"
    return folder


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The folder of real models."""
    return _folder("PELLUCID_MODELS", "real models as .gguf files")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of texts that real models are measured on."""
    return _folder("PELLUCID_DATA", "wikitext-2/wiki.test.raw")


@pytest.fixture(scope="session")
def real_model(models_dir: Path) -> Callable[[str], Path]:
    """real_model("smollm2-135m-instruct-q4_1") -> the path of that .gguf file."""

    def find(name: str) -> Path:
        path = models_dir / f"{name}.gguf"
        if not path.is_file():
            pytest.skip(f"{path.name} is not in PELLUCID_MODELS")
        return path

    return find
