"""How much host memory this process may still take, in bytes: the smallest of what the machine, the
limits of the process and its control groups leave.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from .control_groups import CGROUP_ROOT, group_folders, read_membership

__all__ = ["available_memory", "lies_in_memory"]


def available_memory() -> int:
    """Bytes that this process can take without swapping and without being refused or killed, as far
    as the system reports it.
    """
    limits = (_machine(), *_process_limits(), *_control_groups(CGROUP_ROOT, read_membership()))
    return max(0, min(limits))


def _machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux: all physical memory is the best estimate
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _process_limits() -> Iterator[int]:
    """What `ulimit -v` (address space) and `ulimit -d` (data) leave."""
    try:
        import resource
    except ImportError:  # not a Unix
        return
    try:
        # pages: size resident shared text lib data dt
        fields = [int(n) for n in Path("/proc/self/statm").read_text().split()]
        pages_used = fields[0], fields[5]
    except OSError:  # not Linux
        pages_used = 0, 0
    for kind, pages in zip((resource.RLIMIT_AS, resource.RLIMIT_DATA), pages_used, strict=True):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - pages * os.sysconf("SC_PAGE_SIZE")


def _control_groups(root: Path, membership: str) -> Iterator[int]:
    """The bytes that each control group leaves: its limit minus what is in use and cannot be
    reclaimed.

    Above `memory.high` a group still gets memory, but is slowed down until it hardly runs.
    """
    for folder, version in group_folders("memory", root, membership):
        limits, used, reclaimable = (
            (("memory.max", "memory.high"), "memory.current", "inactive_file")
            if version == 2
            else (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file")
        )
        for name in limits:
            limit = _number(folder / name)
            in_use = _number(folder / used)
            if limit is not None and in_use is not None:
                # pages of files that were read, such as a model's, are reclaimed before anything is
                # killed
                cache = _statistic(folder / "memory.stat", reclaimable)
                yield limit - max(0, in_use - cache)


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no file or it says "max"."""
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _statistic(file: Path, name: str) -> int:
    """One line of a memory.stat; 0 if it is missing."""
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    except OSError:
        pass
    return 0


def lies_in_memory(folder: Path, mounts: str | None = None) -> bool:
    """Whether files in this folder take memory and no disk. `mounts` is the text of
    /proc/self/mountinfo.
    """
    if mounts is None:
        try:
            mounts = Path("/proc/self/mountinfo").read_text()
        except OSError:  # not Linux
            return False
    longest, kind = -1, ""
    for line in mounts.splitlines():
        place, _, source = line.partition(" - ")
        point = Path(place.split()[4].encode().decode("unicode_escape"))
        # the last mount of a folder hides earlier ones
        if folder.is_relative_to(point) and len(point.parts) >= longest:
            longest, kind = len(point.parts), source.split()[0]
    return kind in ("tmpfs", "ramfs")
