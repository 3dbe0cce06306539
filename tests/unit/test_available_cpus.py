"""How many CPUs a process may use: quotas of control groups, of both versions, its own and those
above it.
"""

from pathlib import Path

import pytest

from pellucid.backends.native.backend import _quotas, available_cpus


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (
            "0::/a/b\n",
            {
                "a/b/cpu.max": "400000 100000\n",
                "a/cpu.max": "250000 100000\n",
                "cpu.max": "max 100000\n",
            },
            [4, 2],
        ),
        ("0::/container/unseen\n", {"cpu.max": "150000 100000\n"}, [1]),
        (
            "4:memory:/x\n3:cpu,cpuacct:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
            [3],
        ),
        ("3:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
        (
            "3:cpuset:/\n",
            {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"},
            [],
        ),
    ],
    ids=["version 2", "a container", "version 1", "no quota", "another controller"],
)
def test_quotas_of_a_group_and_of_those_above_it(
    tmp_path: Path, membership: str, files: dict[str, str], expected: list[int]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(_quotas(tmp_path, membership)) == expected


def test_this_process_may_use_a_cpu() -> None:
    assert available_cpus() >= 1
