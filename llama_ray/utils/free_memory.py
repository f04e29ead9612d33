"""How much memory this process may still take: what the machine has free, and what its container allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

_MEMBERSHIP, _ROOT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Return the bytes that this process can take without swapping or exceeding the limit of a cgroup."""
    machine = int(psutil.virtual_memory().available)
    return min([machine, *cgroup_rooms()])


def cgroup_rooms(membership: Path = _MEMBERSHIP, root: Path = _ROOT) -> Iterator[int]:
    """Yield the bytes left below each memory limit that holds for this process, of cgroups v1 and v2.

    A limit of a container, as Kubernetes sets it, is such a limit; the machine's free memory does not know of it. Pages
    of files that were not used lately count as free, as they do for Kubernetes.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        # Not Linux.
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            names, mount = ("memory.max", "memory.current", "inactive_file"), root
        elif "memory" in controllers.split(","):
            names, mount = (
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
                root / "memory",
            )
        else:
            continue
        # In a container the path may be that of the host, of which only the mount's own directory is visible.
        group = mount / path.lstrip("/")
        for directory in (group, *group.parents):
            if directory.is_relative_to(mount) and (room := _room(directory, *names)) is not None:
                yield room


def _room(directory: Path, limit: str, usage: str, inactive: str) -> int | None:
    """Return the bytes left in one cgroup; None if it has no limit."""
    try:
        most = (directory / limit).read_text().strip()
        if most == "max":
            return None
        used = int((directory / usage).read_text())
        stat = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return max(int(most) - max(used - int(stat.get(inactive, 0)), 0), 0)
