"""What the reductions found, as zarr arrays: `statistics/<name>`, one row per tensor of the plan.

Small statistics (thresholds, densities) are kept in memory and written together; large ones (dot products of many
models) go to disk at once, one compressed chunk per tensor. Rows of tensors that have no such statistic read as NaN, or
as -1 for counts. The names of the tensors, in row order, are the attribute `tensors` of the group.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergepipe.storage.atomic import no_room_errors
from mergepipe.storage.ballast import Ballast

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
        import zarr

        attributes: dict[str, Any] = {"tensors": list(tensors)}
        kept = _whole_group(path) if resume else None
        if kept is None:  # said so, because asking whether it is empty lists it
            kept = zarr.open_group(path, mode="w", zarr_format=3, attributes=attributes)
        self._group = kept
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
                if value.nbytes > ROW_BYTES_KEPT:
                    if self.ballast is not None:
                        self.ballast.spend(value.nbytes)
                    self._array(name, value, (1, *value.shape))[row] = value
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
                self._array(name, rows[0], (min(self._rows, ROWS_PER_CHUNK), *rows.shape[1:]))[...] = rows

    def _array(self, name: str, value: npt.NDArray[Any], chunks: tuple[int, ...]) -> Any:
        if name not in self._arrays and name in self._group:
            self._arrays[name] = self._group[name]
        if name not in self._arrays:
            self._arrays[name] = self._group.create_array(
                name,
                shape=(self._rows, *value.shape),
                dtype=value.dtype,
                chunks=tuple(max(1, length) for length in chunks),
                fill_value=_missing(value.dtype),
                dimension_names=("tensor", *(f"axis{i}" for i in range(value.ndim))),
                config={"write_empty_chunks": True},
            )
        return self._arrays[name]


def _whole_group(path: Path) -> Any:
    """The group at `path` if all its metadata can be read, else None: it is never synced, a power cut may tear it."""
    import zarr

    try:
        group = zarr.open_group(path, mode="r+", zarr_format=3)
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
