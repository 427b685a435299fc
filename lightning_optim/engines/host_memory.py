"""How much more memory this process may take: what the system has available, and what its control groups leave."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HostMemory:
    """Memory of the host that a process can still take.

    Attributes:
        free: The number of bytes.
        source: What sets this limit, in words.
    """

    free: int
    source: str


def host_memory(root: Path = Path("/")) -> HostMemory:
    """The least of ``MemAvailable`` and what every control group (v1 and v2) around this process leaves.

    ``MemAvailable`` is what can be had without swapping; a container's own limit does not show in it. The inactive file
    cache of a group is given back when memory is needed, and so counts as free (the "working set" of Kubernetes).

    Args:
        root: Where ``/proc`` and ``/sys`` are.

    Raises:
        RuntimeError: None of these can be read.

    >>> host_memory().free > 0
    True
    """
    found = [*_available(root), *_left_by_groups(root)]
    if not found:
        raise RuntimeError(
            "the free memory of this host is unknown: there is no /proc/meminfo, no control group and no sysconf; "
            "give it as host_free of a Machine"
        )
    return min(found, key=lambda memory: memory.free)


def _available(root: Path) -> list[HostMemory]:
    text = _read(root / "proc/meminfo")
    if match := re.search(r"^MemAvailable:\s+(\d+) kB$", text or "", re.MULTILINE):
        return [HostMemory(int(match[1]) * 1024, "MemAvailable")]
    try:
        return [HostMemory(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"), "free pages")]
    except (AttributeError, OSError, ValueError):
        try:
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, OSError, ValueError):
            return []
        return [HostMemory(total, "all physical memory (how much of it is free is not known here)")]


def _left_by_groups(root: Path) -> list[HostMemory]:
    """What each control group leaves, from this process's own up to the outermost: any of them may have a limit."""
    found = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mounts, files = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], _V2
        elif "memory" in controllers.split(","):
            mounts, files = ["sys/fs/cgroup/memory"], _V1
        else:
            continue
        for mount in mounts:
            base = root / mount
            # In a container the path may be the host's, while the mount is the group itself: so the base counts too.
            own = base / path.strip("/")
            for folder in (own, *own.parents):
                if (memory := _left_by(folder, files)) is not None:
                    found.append(memory)
                if folder == base:
                    break
    return found


@dataclass(frozen=True)
class _Files:
    version: str
    limit: str
    usage: str
    inactive: str


_V1 = _Files("v1", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("v2", "memory.max", "memory.current", "inactive_file")


def _left_by(folder: Path, files: _Files) -> HostMemory | None:
    limit, usage = _read(folder / files.limit), _read(folder / files.usage)
    if limit is None or usage is None or not limit.strip().isdecimal():  # v2 has "max" where there is no limit
        return None
    # v1 has the largest multiple of a page in 63 bits where there is none: far above MemAvailable, so never the least.
    inactive = re.search(rf"^{files.inactive} (\d+)$", _read(folder / "memory.stat") or "", re.MULTILINE)
    taken = max(0, int(usage) - (int(inactive[1]) if inactive else 0))
    return HostMemory(max(0, int(limit) - taken), f"the limit of a control group ({files.version})")


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None
