"""Control groups limit what there is, whichever version of them the machine has."""

from __future__ import annotations

from pathlib import Path

from mergepipe.pipeline.machine import group_limits


def group(folder: Path, limit: str, used: int, cache: int, *, version: int) -> None:
    folder.mkdir(parents=True)
    limit_name, used_name, cache_name = (
        ("memory.max", "memory.current", "inactive_file")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    )
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / used_name).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{cache_name} {cache}\nother 9\n")


def test_version_2_counts_its_parents(tmp_path: Path) -> None:
    group(tmp_path / "user" / "job", "max", 10, 0, version=2)
    (tmp_path / "user" / "memory.max").write_text("1000\n")
    (tmp_path / "user" / "memory.current").write_text("700\n")
    (tmp_path / "user" / "memory.stat").write_text("inactive_file 200\n")
    assert list(group_limits("0::/user/job\n", tmp_path)) == [500]


def test_version_1(tmp_path: Path) -> None:
    group(tmp_path / "memory" / "box", "1000", 1200, 0, version=1)
    assert list(group_limits("5:cpu,cpuacct:/\n4:memory:/box\n0::/\n", tmp_path)) == [0]


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert list(group_limits("0::/\n4:memory:/box\nnonsense\n", tmp_path)) == []
