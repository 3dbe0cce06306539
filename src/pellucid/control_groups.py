"""The Linux control groups of this process: the folders that hold their limits.

A limit of a group applies to all groups below it, so every level from the process's own group up to
the root is read. `/proc/self/cgroup` names the own group. Inside a container some levels of that
path may not exist; those are skipped.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

__all__ = ["CGROUP_ROOT", "GroupFolder", "group_folders", "read_membership"]

CGROUP_ROOT = Path("/sys/fs/cgroup")


class GroupFolder(NamedTuple):
    """The files of one group for one controller."""

    path: Path
    version: int  # of control groups: 1 or 2


def read_membership() -> str:
    """The text of /proc/self/cgroup; empty if the system has no control groups."""
    try:
        return Path("/proc/self/cgroup").read_text()
    except OSError:
        return ""


def group_folders(controller: str, root: Path, membership: str) -> Iterator[GroupFolder]:
    """The groups of `membership` that `controller` ("memory", "cpu") governs, each followed by the
    groups above it. The folders need not exist.
    """
    for line in membership.splitlines():
        number, controllers, group = line.split(":", 2)
        # version 2 has one hierarchy, numbered 0; version 1 has one for each controller
        if number == "0":
            top, version = root, 2
        elif controller in controllers.split(","):
            top, version = root / controller, 1
        else:
            continue
        own = PurePosixPath(group.lstrip("/"))
        for part in (own, *own.parents):
            yield GroupFolder(top / part, version)
