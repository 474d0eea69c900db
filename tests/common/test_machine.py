"""Facts about the machine: a container's limit on memory by the files of control groups, and WSL."""

import platform
from pathlib import Path

import pytest
from cgroups import write

from qlora_trainer.common import machine

GIB = 2**30


def test_without_control_groups_it_is_what_the_machine_has(groups: Path) -> None:
    assert machine.host_memory() == machine.HostMemory(64 * GIB, 40 * GIB)


def test_limit_of_version_2_counts_less_what_its_group_uses(groups: Path) -> None:
    machine.CGROUP_LIST.write_text("0::/docker/abc\n")
    stat = f"anon 5\ninactive_file {3 * GIB}\nactive_file 7"
    write(groups / "docker" / "abc", memory__max=16 * GIB, memory__current=10 * GIB, memory__stat=stat)
    assert machine.host_memory() == machine.HostMemory(16 * GIB, 9 * GIB, is_limited=True)


def test_limit_of_a_group_above_holds_too(groups: Path) -> None:
    machine.CGROUP_LIST.write_text("0::/slice/job\n")
    write(groups / "slice" / "job", memory__max="max", memory__current=GIB)
    write(groups / "slice", memory__max=8 * GIB, memory__current=2 * GIB)
    assert machine.host_memory() == machine.HostMemory(8 * GIB, 6 * GIB, is_limited=True)


def test_limit_of_version_1_is_read_where_a_container_sees_it(groups: Path) -> None:
    """The list names the group from outside; inside, it lies at the root."""
    machine.CGROUP_LIST.write_text("12:cpu,cpuacct:/docker/abc\n9:memory:/docker/abc\n1:name=systemd:/x\n")
    files = {"memory__limit_in_bytes": 12 * GIB, "memory__usage_in_bytes": 4 * GIB}
    write(groups / "memory", **files, memory__stat=f"cache 1\ntotal_inactive_file {GIB}")
    assert machine.host_memory() == machine.HostMemory(12 * GIB, 9 * GIB, is_limited=True)


def test_no_limit_is_none(groups: Path) -> None:
    """Version 1 writes the largest number there is, version 2 a word."""
    machine.CGROUP_LIST.write_text("9:memory:/\n0::/\n")
    write(groups / "memory", memory__limit_in_bytes=9223372036854771712, memory__usage_in_bytes=GIB)
    write(groups, memory__max="max", memory__current=GIB)
    assert machine.host_memory() == machine.HostMemory(64 * GIB, 40 * GIB)


def test_group_over_its_limit_has_nothing_available(groups: Path) -> None:
    machine.CGROUP_LIST.write_text("0::/\n")
    write(groups, memory__max=GIB, memory__current=2 * GIB)
    assert machine.host_memory().available == 0


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", True),
        ("4.4.0-19041-Microsoft", True),
        ("6.1.0-18-amd64", False),
    ],
)
def test_wsl_is_known_by_its_kernel(monkeypatch: pytest.MonkeyPatch, release: str, expected: bool) -> None:
    monkeypatch.setattr(platform, "release", lambda: release)
    assert machine.is_wsl() == expected
