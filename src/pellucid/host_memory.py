"""How much memory this process may still take: what the machine has available, within the limit of
its control group. In bytes.
"""

import os
from pathlib import Path

__all__ = ["available_memory"]


def available_memory() -> int:
    """Bytes that can be taken without swapping, as far as the system tells: the least of the
    machine's and the control group's.
    """
    return max(0, min(_machine(), _control_group()))


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all physical memory is the best that can be said
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _control_group() -> int:
    """Linux control groups, version 2 (memory.max, as a container sees it) or 1; no limit where
    neither is there.
    """
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        (
            "/sys/fs/cgroup/memory/memory.limit_in_bytes",
            "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ),
    ):
        try:
            text = Path(limit).read_text().strip()
            if text != "max":
                return int(text) - int(Path(used).read_text())
        except OSError:
            continue
    return 1 << 62
