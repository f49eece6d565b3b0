"""Free memory by the kernel's own numbers, by made-up ones, and where there is no /proc."""

import os
import pathlib

import pytest

from z1_jax.host_memory import free_host_bytes, host_bytes

MB = 2**20


def write(root: pathlib.Path, **files: str) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path):
    """A machine with 1,000 MB available of 4,000."""
    write(tmp_path, **{"proc/meminfo": f"MemTotal: {4000 * 1024} kB\nMemAvailable: {1000 * 1024} kB\n"})
    return tmp_path


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="not Linux")
def test_free_host_memory_is_what_the_kernel_says():
    total = next(int(s.split()[1]) * 1024 for s in open("/proc/meminfo") if s.startswith("MemTotal:"))
    assert 0 < free_host_bytes() <= total


def test_without_proc_the_c_library_says(tmp_path, monkeypatch):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_host_bytes(tmp_path) <= physical
    mac = {name: number for name, number in os.sysconf_names.items() if name != "SC_AVPHYS_PAGES"}
    monkeypatch.setattr(os, "sysconf_names", mac)  # macOS does not know this name
    assert free_host_bytes(tmp_path) == physical // 2


def test_without_a_limit_it_is_what_is_available(root):
    assert free_host_bytes(root) == 1000 * MB
    write(root, **{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.current": "1"})  # the top has no memory.max
    assert free_host_bytes(root) == 1000 * MB


def test_the_narrowest_group_above_counts(root):
    """Version 2: 600 MB less 250, of which 50 are cached files; the outer group leaves 300; the rest has no limit."""
    write(
        root,
        **{
            "proc/self/cgroup": "0::/outer/inner/leaf\n",
            "sys/fs/cgroup/outer/inner/leaf/memory.max": "max\n",
            "sys/fs/cgroup/outer/inner/leaf/memory.current": f"{250 * MB}\n",
            "sys/fs/cgroup/outer/inner/memory.max": f"{600 * MB}\n",
            "sys/fs/cgroup/outer/inner/memory.current": f"{250 * MB}\n",
            "sys/fs/cgroup/outer/inner/memory.stat": f"anon 7\ninactive_file {50 * MB}\n",
        },
    )
    assert free_host_bytes(root) == 400 * MB
    write(
        root,
        **{
            "sys/fs/cgroup/outer/memory.max": f"{900 * MB}\n",
            "sys/fs/cgroup/outer/memory.current": f"{600 * MB}\n",
        },
    )
    assert free_host_bytes(root) == 300 * MB


def test_version_1_in_a_container(root):
    """The group has the host's name, and its files lie at the top of what the container sees."""
    top = "sys/fs/cgroup/memory/memory."
    write(
        root,
        **{
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
            f"{top}limit_in_bytes": f"{500 * MB}\n",
            f"{top}usage_in_bytes": f"{200 * MB}\n",
            f"{top}stat": f"inactive_file 1\ntotal_inactive_file {30 * MB}\n",
        },
    )
    assert free_host_bytes(root) == 330 * MB
    write(root, **{f"{top}limit_in_bytes": f"{2**63 - 4096}\n"})
    assert free_host_bytes(root) == 1000 * MB


def test_what_there_is_in_all(root):
    """Swap is memory, and the narrowest limit counts, however much of it is in use."""
    write(root, **{"proc/meminfo": f"MemTotal: {4000 * 1024} kB\nMemAvailable: 1 kB\nSwapTotal: {500 * 1024} kB\n"})
    assert host_bytes(root) == 4500 * MB
    group = "sys/fs/cgroup/outer/memory."
    write(root, **{"proc/self/cgroup": "0::/outer/inner\n", f"{group}max": f"{900 * MB}\n", f"{group}current": "5\n"})
    assert host_bytes(root) == 900 * MB


def test_a_group_beyond_its_limit_has_nothing_left(root):
    write(
        root,
        **{
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": f"{100 * MB}\n",
            "sys/fs/cgroup/memory.current": f"{120 * MB}\n",
        },
    )
    assert free_host_bytes(root) == 0
