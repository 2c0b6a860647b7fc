"""What the reductions found, as zarr arrays: `statistics/<name>`, one row per tensor of the plan.

Small statistics (thresholds, densities) are kept in memory and written together; large ones (dot products of many
models) go to disk at once, one compressed chunk per tensor. Rows of tensors that have no such statistic read as NaN, or
as -1 for counts. The names of the tensors, in row order, are the attribute `tensors` of the group.

zarr takes a sixth of a second to import, and a run that begins has no time to spare: the disk waits. So a new group is
written without it, and it is imported with the first statistic, without one never; beside the work, since no unit of
that tensor goes on until its statistics are kept.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergepipe.storage.atomic import no_room_errors
from mergepipe.storage.ballast import Ballast
from mergepipe.storage.hierarchy import GROUP_DOCUMENT

ROW_BYTES_KEPT = 4096
"""Statistics with rows up to this size are gathered in memory; larger ones are written row by row."""

ROWS_PER_CHUNK = 4096
"""Tensors in one chunk of a small statistic, at the most."""


class StatisticsStore:
    """The zarr group of one job's statistics.

    Parameters
    ----------
    path : Path
        Folder of the group.
    tensors : sequence of str
        Names of the tensors, in plan order.
    resume : bool
        Go on with the group that is there, if it can be read; otherwise it is replaced.

    Attributes
    ----------
    ballast : Ballast or None
        Disk space set aside for what is put here, if there is any.
    """

    def __init__(self, path: Path, tensors: Sequence[str], *, resume: bool = False) -> None:
        self._group: Future[Any] | None = None
        whole = _whole_group(path) if resume else None
        if whole is None:
            _begin_group(path, {"tensors": list(tensors)})
        else:
            self._group = Future()
            self._group.set_result(whole)
        self.ballast: Ballast | None = None
        self._path = path
        self._rows = len(tensors)
        self._small: dict[str, npt.NDArray[Any]] = {}
        self._arrays: dict[str, Any] = {}
        self._lock = threading.Lock()

    def put(self, row: int, state: Mapping[str, npt.NDArray[Any]]) -> None:
        """Keep the statistics of tensor number `row`; names with a leading underscore are a method's own and not kept.

        Large ones are on disk when this returns, small ones after :meth:`flush`.
        """
        with self._lock, no_room_errors(self._path):
            for name, value in state.items():
                if name.startswith("_"):
                    continue
                group = self._open()
                if value.nbytes > ROW_BYTES_KEPT:
                    if self.ballast is not None:
                        self.ballast.spend(value.nbytes)
                    self._array(group.result(), name, value, (1, *value.shape))[row] = value
                    continue
                if name not in self._small:
                    self._small[name] = np.full((self._rows, *value.shape), _missing(value.dtype), value.dtype)
                self._small[name][row] = value

    def flush(self) -> None:
        """Write the small statistics."""
        with self._lock, no_room_errors(self._path):
            if self.ballast is not None:
                self.ballast.close()
            for name, rows in self._small.items():
                chunks = (min(self._rows, ROWS_PER_CHUNK), *rows.shape[1:])
                self._array(self._open().result(), name, rows[0], chunks)[...] = rows

    def _open(self) -> Future[Any]:
        """The group, which is opened by a thread of its own unless it is open."""
        if self._group is None:
            opener = ThreadPoolExecutor(1, "mergepipe-statistics")
            self._group = opener.submit(_open_group, self._path)
            opener.shutdown(wait=False)
        return self._group

    def _array(self, group: Any, name: str, value: npt.NDArray[Any], chunks: tuple[int, ...]) -> Any:
        if name not in self._arrays and name in group:
            self._arrays[name] = group[name]
        if name not in self._arrays:
            self._arrays[name] = group.create_array(
                name,
                shape=(self._rows, *value.shape),
                dtype=value.dtype,
                chunks=tuple(max(1, length) for length in chunks),
                fill_value=_missing(value.dtype),
                dimension_names=("tensor", *(f"axis{i}" for i in range(value.ndim))),
                config={"write_empty_chunks": True},
            )
        return self._arrays[name]


def _begin_group(path: Path, attributes: dict[str, Any]) -> None:
    """Write a group without arrays in place of what is at `path`."""
    with no_room_errors(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        text = json.dumps({**GROUP_DOCUMENT, "attributes": attributes}, indent=2)
        (path / "zarr.json").write_text(text, encoding="utf-8")


def _open_group(path: Path) -> Any:
    import zarr

    return zarr.open_group(path, mode="r+", zarr_format=3)


def _whole_group(path: Path) -> Any:
    """The group at `path` if all its metadata can be read, else None: it is never synced, a power cut may tear it."""
    try:
        group = _open_group(path)
        # One by one: asked for all of them, zarr warns of what a killed write has left beside them.
        for child in path.iterdir():
            if child.is_dir() and not (child / "zarr.json").exists():
                shutil.rmtree(child)  # an array that had only been begun: nothing is in it
            elif child.is_dir():
                group[child.name]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return group


def _missing(dtype: np.dtype[Any]) -> float | int:
    return float("nan") if dtype.kind == "f" else -1
