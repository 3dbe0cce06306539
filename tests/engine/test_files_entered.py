"""How many files of the package a step of decode and a whole request enter: what a reader must know
to follow one. docs/lifecycle.md tells the same numbers.

A file counts where one of its functions is called, in whichever thread. Properties and dataclasses
count like everything else. The page rounds the two larger numbers to tens.
"""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

import pellucid
from pellucid import LLM, EngineConfig, SamplingParams
from pellucid.engine.admission import Submission
from pellucid.engine.loader import build_engine
from pellucid.engine.prompts import TokenizedPrompt

PACKAGE = Path(pellucid.__file__).parent
DOCS = Path(__file__).parents[2] / "docs" / "lifecycle.md"
MOST_OF_A_STEP = 14
PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@contextmanager
def entered() -> Iterator[set[str]]:
    """The files of the package in which a function is called meanwhile, in any thread."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(str(PACKAGE)):
            files.add(str(Path(path).relative_to(PACKAGE)))

    profile: Callable[..., None] = note
    gc.collect()
    gc.disable()  # what other tests left behind would be finalized here
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield files
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
        gc.enable()


def test_a_step_of_decode_enters_few_files(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    core = build_engine(tiny_path, EngineConfig(speculative=None)).core
    prompt = TokenizedPrompt([65, 66, 67], None)
    core.add_requests([Submission("a", prompt, PARAMS)])
    core.step()
    core.step()
    with entered() as files:
        core.step()
    with capsys.disabled():
        print(f"\na step of decode enters {len(files)} files: {', '.join(sorted(files))}")
    assert len(files) <= MOST_OF_A_STEP
    assert f"a step of decode runs code of {len(files)} files" in _words(DOCS)


def test_a_whole_request_enters_as_many_files_as_the_page_says(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(tiny_path, speculative=None)
    with entered() as files:
        llm.generate("The capital of France is", PARAMS, use_tqdm=False)
    with capsys.disabled():
        print(f"\na request enters {len(files)} files: {', '.join(sorted(files))}")
    assert f"A whole request runs code of about {round(len(files), -1)} files" in _words(DOCS)


def test_loading_enters_as_many_files_as_the_page_says(
    tiny_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with entered() as files:
        LLM(tiny_path, speculative=None)
    with capsys.disabled():
        print(f"\nloading enters {len(files)} files: {', '.join(sorted(files))}")
    assert f"Loading runs code of about {round(len(files), -1)} files" in _words(DOCS)


def _words(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())
