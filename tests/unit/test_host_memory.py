"""How much memory this process may take: limits of the process and of its control groups."""

import subprocess
import sys
from pathlib import Path

import pytest

from pellucid.host_memory import _control_groups, available_memory, lies_in_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "max\n",
                "a/b/memory.high": f"{2 * GIB}\n",
                "a/b/memory.current": f"{GIB}\n",
                "a/memory.max": f"{8 * GIB}\n",
                "a/memory.current": f"{5 * GIB}\n",
                "a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
            },
            [GIB, 4 * GIB],
        ),
        (
            "0::/container/unseen\n",
            {"memory.max": f"{3 * GIB}", "memory.current": f"{2 * GIB}"},
            [GIB],
        ),
        (
            "4:memory:/x\n3:cpu:/x\n0::/\n",
            {
                "memory/x/memory.limit_in_bytes": f"{4 * GIB}",
                "memory/x/memory.usage_in_bytes": f"{3 * GIB}",
                "memory/x/memory.stat": f"inactive_file 7\ntotal_inactive_file {2 * GIB}\n",
                "memory/memory.limit_in_bytes": f"{9 * GIB}",
                "memory/memory.usage_in_bytes": f"{3 * GIB}",
            },
            [3 * GIB, 6 * GIB],
        ),
        ("3:cpu:/\n", {"memory/memory.limit_in_bytes": "1"}, []),
    ],
    ids=["version 2", "a container", "version 1", "another controller"],
)
def test_what_is_in_use_is_subtracted_from_the_limit_of_each_control_group(
    tmp_path: Path, membership: str, files: dict[str, str], expected: list[int]
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(_control_groups(tmp_path, membership)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what is in use")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts_less_what_it_uses(limit: str) -> None:
    code = f"""
import resource
resource.setrlimit(resource.{limit}, (3 << 30, 3 << 30))
from pellucid.host_memory import available_memory
before = available_memory()
kept = bytearray(1 << 28)
print(before, before - available_memory())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, taken = map(int, run.stdout.split())
    assert 1 << 30 < before < 3 << 30
    assert 1 << 28 <= taken < 1 << 29


def test_some_memory_is_available() -> None:
    assert available_memory() > 1 << 20


def test_folders_in_memory_are_known_by_the_mount_that_holds_them() -> None:
    mounts = (
        "22 27 0:21 / / rw shared:1 - ext4 /dev/vda rw\n"
        "25 24 0:23 / /tmp rw - tmpfs tmpfs rw\n"
        "26 24 0:24 / /tmp/a\\040b rw - ext4 /dev/vdb rw\n"
    )
    assert lies_in_memory(Path("/tmp/x"), mounts) and lies_in_memory(Path("/tmp"), mounts)
    assert not lies_in_memory(Path("/tmp/a b/x"), mounts)
    assert not lies_in_memory(Path("/tmpfile"), mounts) and not lies_in_memory(Path("/"), mounts)
