"""The planted bugs of `scripts/mutate`: each text that one replaces is still in the code."""

from pathlib import Path

import pytest

import pellucid

from .mutations import FAULTS, MUTATIONS

PACKAGE = Path(pellucid.__file__).parent
TESTS = Path(__file__).parents[2]


@pytest.mark.parametrize("bug", [*MUTATIONS, *FAULTS], ids=lambda bug: bug[0])
def test_a_planted_bug_changes_the_code_and_its_tests_exist(bug: tuple[str, ...]) -> None:
    _, file, old, new, *tests = bug
    assert old and old != new and old in (PACKAGE / file).read_text()
    assert all((TESTS / test).is_file() for test in " ".join(tests).split())
