"""The public names of the package: shown by dir(), and each of them can be had."""

import pellucid


def test_dir_shows_the_public_names_and_each_can_be_had() -> None:
    assert dir(pellucid) == sorted(pellucid.__all__)
    assert all(getattr(pellucid, name) is not None for name in pellucid.__all__)
