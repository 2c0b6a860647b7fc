"""Statistics are ordinary zarr arrays that any reader opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from mergepipe.storage.statistics import StatisticsStore


def test_rows_are_there_and_missing_ones_are_marked(tmp_path: Path) -> None:
    store = StatisticsStore(tmp_path / "statistics", ["a", "b", "c"])
    histogram = np.arange(2 * 32768, dtype=np.int64).reshape(2, 32768)
    store.put(1, {"thresholds": np.array([0.5, 0.25], np.float32), "histogram": histogram})
    store.flush()
    group = zarr.open_group(tmp_path / "statistics", mode="r")
    assert list(group.attrs["tensors"]) == ["a", "b", "c"]
    assert np.array_equal(group["thresholds"][1], [0.5, 0.25])
    assert np.isnan(group["thresholds"][0]).all()
    assert np.array_equal(group["histogram"][1], histogram)
    assert (group["histogram"][2] == -1).all(), "what is missing does not look like a count"


def test_resuming_keeps_what_was_there(tmp_path: Path) -> None:
    histogram = np.full((1, 32768), 7, np.int64)
    StatisticsStore(tmp_path / "statistics", ["a", "b"]).put(0, {"histogram": histogram})
    store = StatisticsStore(tmp_path / "statistics", ["a", "b"], resume=True)
    store.put(1, {"histogram": histogram + 1})
    store.flush()
    group = zarr.open_group(tmp_path / "statistics", mode="r")
    assert (group["histogram"][0] == 7).all()
    assert (group["histogram"][1] == 8).all()


def test_a_new_run_starts_with_empty_statistics(tmp_path: Path) -> None:
    StatisticsStore(tmp_path / "statistics", ["a"]).put(0, {"histogram": np.ones((1, 32768), np.int64)})
    StatisticsStore(tmp_path / "statistics", ["a"])
    assert "histogram" not in zarr.open_group(tmp_path / "statistics", mode="r")


def test_what_a_killed_write_leaves_takes_nothing_along(tmp_path: Path) -> None:
    histogram = np.full((1, 32768), 7, np.int64)
    StatisticsStore(tmp_path / "statistics", ["a", "b"]).put(0, {"histogram": histogram})
    (tmp_path / "statistics" / "densities").mkdir()
    (tmp_path / "statistics" / "zarr.0.partial").write_text("{")
    store = StatisticsStore(tmp_path / "statistics", ["a", "b"], resume=True)
    store.put(1, {"histogram": histogram + 1, "densities": np.array([0.5], np.float32)})
    store.flush()
    group = zarr.open_group(tmp_path / "statistics", mode="r")
    assert (group["histogram"][0] == 7).all()
    assert group["densities"][1] == 0.5


def test_statistics_that_a_power_cut_tore_begin_anew(tmp_path: Path) -> None:
    StatisticsStore(tmp_path / "statistics", ["a"]).put(0, {"histogram": np.ones((1, 32768), np.int64)})
    (tmp_path / "statistics" / "histogram" / "zarr.json").write_text("{")
    StatisticsStore(tmp_path / "statistics", ["a"], resume=True)
    assert "histogram" not in zarr.open_group(tmp_path / "statistics", mode="r")
