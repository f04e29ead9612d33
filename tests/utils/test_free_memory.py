from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from llama_ray.utils.free_memory import cgroup_rooms, free_memory

V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def write_group(
    directory: Path, names: tuple[str, str, str], limit: object, usage: int, inactive: int
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / names[0]).write_text(f"{limit}\n")
    (directory / names[1]).write_text(f"{usage}\n")
    (directory / "memory.stat").write_text(f"anon 5\n{names[2]} {inactive}\n")


def rooms(tmp_path: Path, membership: str) -> list[int]:
    file = tmp_path / "membership"
    file.write_text(membership)
    return list(cgroup_rooms(file, tmp_path / "cgroup"))


def test_every_limit_above_the_process_counts(tmp_path: Path) -> None:
    root = tmp_path / "cgroup"
    write_group(root / "pods", V2, 1000, 700, 50)
    write_group(root / "pods/a", V2, "max", 600, 0)
    write_group(root / "pods/a/b", V2, 800, 500, 100)
    assert sorted(rooms(tmp_path, "0::/pods/a/b\n")) == [350, 400]


def test_the_limit_of_a_container_counts_where_the_path_is_that_of_the_host(tmp_path: Path) -> None:
    write_group(tmp_path / "cgroup", V2, 1000, 1200, 100)
    assert rooms(tmp_path, "0::/kubepods/pod7/c1\n") == [0]


def test_limits_of_the_first_version_count(tmp_path: Path) -> None:
    write_group(tmp_path / "cgroup/memory/docker/c1", V1, 1000, 300, 100)
    write_group(tmp_path / "cgroup/cpu/docker/c1", V1, 10, 0, 0)
    assert rooms(tmp_path, "9:name=systemd:/\n4:memory:/docker/c1\n1:cpu:/docker/c1\n0::/\n") == [800]


@pytest.mark.parametrize("membership", ["0::/\n", "4:memory:/docker/c1\n", ""])
def test_without_limits_the_machine_decides(tmp_path: Path, membership: str) -> None:
    assert rooms(tmp_path, membership) == []


def test_no_more_is_free_than_the_machine_has() -> None:
    assert 0 < free_memory() <= psutil.virtual_memory().total
