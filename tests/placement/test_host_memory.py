"""Free memory of the host, from files as Linux has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_optim.engines.host_memory import host_memory


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    800 kB\n"}
V2 = {"proc/self/cgroup": "0::/box/inner\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/box\n0::/\n"}
UNLIMITED = "9223372036854771712\n"


def test_without_limits_it_is_what_is_available(tmp_path: Path) -> None:
    found = host_memory(machine(tmp_path, MEMINFO))
    assert (found.free, found.source) == (800 * 1024, "MemAvailable")


@pytest.mark.parametrize("folder", ["sys/fs/cgroup/box/inner", "sys/fs/cgroup/box", "sys/fs/cgroup"])
def test_a_limit_of_version_2_wherever_it_is(folder: str, tmp_path: Path) -> None:
    limit = {f"{folder}/memory.max": "500000\n", f"{folder}/memory.current": "300000\n"}
    stat = {f"{folder}/memory.stat": "anon 250000\ninactive_file 40000\nactive_file 10000\n"}
    found = host_memory(machine(tmp_path, {**MEMINFO, **V2, **limit, **stat}))
    assert (found.free, found.source) == (240000, "the limit of a control group (v2)")


def test_version_2_without_a_limit(tmp_path: Path) -> None:
    files = {"sys/fs/cgroup/box/memory.max": "max\n", "sys/fs/cgroup/box/memory.current": "300000\n"}
    assert host_memory(machine(tmp_path, {**MEMINFO, **V2, **files})).source == "MemAvailable"


def test_a_limit_of_version_1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/memory/box"
    files = {
        f"{folder}/memory.limit_in_bytes": "500000\n",
        f"{folder}/memory.usage_in_bytes": "300000\n",
        f"{folder}/memory.stat": "inactive_file 1\ntotal_inactive_file 40000\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": UNLIMITED,
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "900000\n",
    }
    found = host_memory(machine(tmp_path, {**MEMINFO, **V1, **files}))
    assert (found.free, found.source) == (240000, "the limit of a control group (v1)")


def test_a_container_whose_path_is_that_outside(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "4:memory:/docker/0123\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "500000\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "600000\n",
    }
    assert host_memory(machine(tmp_path, {**MEMINFO, **files})).free == 0


def test_here_it_is_no_more_than_there_is() -> None:
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024 if Path("/proc/meminfo").exists() else 2**60
    assert 0 < host_memory().free <= total
