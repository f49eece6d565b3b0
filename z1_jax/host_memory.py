"""How much memory the host has free, and how much of it this process may take."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator

_UNLIMITED = 2**60  # cgroup v1 writes a number near 2^63 where there is no limit


def free_host_bytes(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that can be had without swapping, within the limits of this process's control groups (Linux).

    Args:
        root: where /proc and /sys are; where they are not, as on macOS, the C library is asked.
    """
    return max(0, min([_free_of_system(root), *_free_of_groups(root)]))


def host_bytes(root: pathlib.Path = pathlib.Path("/")) -> int:
    """Bytes that the host has in all, swap included, within the limits of this process's control groups (Linux)."""
    lines = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    known = {entry[0]: 1024 * int(entry[1]) for entry in lines if entry[0] in ("MemTotal:", "SwapTotal:")}
    total = sum(known.values()) or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([total, *(limit for limit, _ in _limits(root))])


def _free_of_system(root: pathlib.Path) -> int:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    page = os.sysconf("SC_PAGE_SIZE")
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * page
    return os.sysconf("SC_PHYS_PAGES") * page // 2  # macOS does not say what is free


def _free_of_groups(root: pathlib.Path) -> Iterator[int]:
    """Bytes that each memory limit leaves."""
    return (limit - used for limit, used in _limits(root))


def _limits(root: pathlib.Path) -> Iterator[tuple[int, int]]:
    """Each memory limit of the process's control group and of its parents, v2 then v1, and what is in use of it."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            top, names, cached = root / "sys/fs/cgroup", ("memory.max", "memory.current"), "inactive_file"
        elif "memory" in controllers.split(","):
            top, cached = root / "sys/fs/cgroup/memory", "total_inactive_file"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        inside = top / group.lstrip("/")
        # In a container the group may have the host's name, and its files lie at the top.
        for folder in (f for f in (inside, *inside.parents) if f.is_relative_to(top)):
            limit, used = (_read(folder / name).strip() for name in names)
            if limit.isdigit() and used.isdigit() and int(limit) < _UNLIMITED:
                yield int(limit), int(used) - _entry(_read(folder / "memory.stat"), cached)


def _entry(table: str, name: str) -> int:
    """The number behind `name`; 0 where there is none. Files that are cached and not in use make room when asked to."""
    return next((int(value) for key, value in map(str.split, table.splitlines()) if key == name), 0)


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
