"""A task's own values from a unified merge: ``base + rescaler * mask * (merged - base)``, piece by piece."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, DamageError, InputChangedError, NonFiniteError
from mergepipe.pipeline.chain_plan import as_planned
from mergepipe.pipeline.masks import BASE, BASE_ROWS, RESCALERS
from mergepipe.pipeline.outputs import TASKS_FOLDER
from mergepipe.pipeline.records import MANIFEST_NAME, read_record
from mergepipe.storage.bits import MASKS_NAME, unpack
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry, file_info, fingerprint, open_checkpoint
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import HeaderTensor, read_header
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import Reader
from mergepipe.tasks import convert


class TaskMask:
    """The masks of one task, the merge they belong to, and its base.

    Parameters
    ----------
    merged : Checkpoint
        The unified merge.
    task : str
        A folder in its `tasks`.
    base : Path, optional
        Where the base is now; by default where it was, and then it must be as it was.

    Raises
    ------
    CheckpointNotFoundError
        If the base is gone.
    InputChangedError
        If it is another one than at the time of the merge.
    CheckpointError, DamageError
        If the base does not fit the merge, or the mask file is not one of ours.

    Attributes
    ----------
    files : tuple of FileInfo
        What is read beside the merge itself.
    """

    def __init__(self, merged: Checkpoint, task: str, base: Path | None = None) -> None:
        self._path = Path(merged.root) / TASKS_FOLDER / task / MASKS_NAME
        own = file_info(self._path)
        header = read_header(self._path)
        try:
            self._factors: dict[str, float] = json.loads(header.metadata[RESCALERS])
            below: dict[str, Any] = json.loads(header.metadata[BASE])
            self._places = {tensor.name: (header.data_start + tensor.start, tensor) for tensor in header.tensors}
        except (KeyError, ValueError) as error:
            raise DamageError(f"'{self._path}' holds no rescalers: it is not a mask file of mergepipe") from error
        self.merged = merged
        self._base = self._find_base(Path(merged.root), base, below["model"])
        self._below = {name: (self._base, below["names"].get(name, name)) for name in self._places}
        self.files = (own, *self._base.files)
        rows = self._path.parent.parent / BASE_ROWS
        if rows.is_file():
            kept = open_checkpoint(rows)
            self.files += kept.files
            self._below |= {name: (kept, name) for name in self._below if name in kept.tensors}
        for name, (_, tensor) in self._places.items():
            self._check(name, tensor)

    @staticmethod
    def _find_base(folder: Path, given: Path | None, called: str) -> Checkpoint:
        if given is not None:
            return open_checkpoint(given)
        try:
            record = read_record(folder)
            was = next(model for model in record["inputs"] if model["model"] == called)
            path, mark = str(was["path"]), was["fingerprint"]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise CheckpointNotFoundError(
                f"'{folder / MANIFEST_NAME}' does not say what the base of the merge was: name it with --base"
            ) from error
        try:
            found = open_checkpoint(Path(path))
        except CheckpointNotFoundError as error:
            raise CheckpointNotFoundError(f"the base '{path}' is gone: say where it is now with --base") from error
        # A base that an earlier merge of the same recipe has made is known by that merge's plan.
        if mark not in (fingerprint(found), fingerprint(as_planned(found))):
            raise InputChangedError(
                f"the base '{path}' changed since the merge was made: bring it back, or name a copy of it with --base"
            )
        return found

    def _check(self, name: str, mask: HeaderTensor) -> None:
        own, (base, called) = self.merged.tensors.get(name), self._below[name]
        below = base.tensors.get(called)
        if own is None or name not in self._factors or mask.shape != (-(-math.prod(own.shape) // 8),):
            raise DamageError(f"the mask of '{name}' in '{self._path}' belongs to another merge")
        if below is None or below.shape != own.shape:
            raise CheckpointError(
                f"the base '{base.root}' has no '{called}' of shape {own.shape}: name the right one with --base"
            )

    def __contains__(self, name: str) -> bool:
        """Whether a tensor has a mask."""
        return name in self._places

    def values(self, name: str, start: int, count: int, reader: Reader) -> npt.NDArray[Any]:
        """Stored bits of the task's elements from `start` on, in the dtype of the merge; a new array."""
        own, (of, called) = self.merged.tensors[name], self._below[name]
        below = of.tensors[called]
        work = np.dtype("f8") if "F64" in (own.dtype, below.dtype) else np.dtype("f4")
        base, tau = np.empty(count, work), np.empty(count, work)
        self._decode(of, below, start, base, None, reader)
        self._decode(self.merged, own, start, tau, base, reader)
        first, last = start // 8, -(-(start + count) // 8)
        with reader.window([Segment(str(self._path), self._places[name][0] + first, last - first)], last=True) as raw:
            tau[~unpack(raw.copy(), start, count)] = 0
        tau *= work.type(self._factors[name])
        tau += base
        out = np.empty(count, DTYPES[own.dtype].bits)
        overflow = convert.encode(tau, own.dtype, out)
        if overflow >= 0:
            raise NonFiniteError(f"'{name}' overflows {DTYPES[own.dtype].alias} at element {start + overflow:,}")
        return out

    def _decode(self, of: Checkpoint, entry: TensorEntry, start: int, out: Any, base: Any, reader: Reader) -> None:
        itemsize = DTYPES[entry.dtype].itemsize
        segment = Segment(of.files[entry.file].path, entry.offset + start * itemsize, out.size * itemsize)
        with reader.window([segment], last=True) as window:
            bits = window.copy().view(DTYPES[entry.dtype].bits)
        bad = (
            convert.decode(bits, entry.dtype, out)
            if base is None
            else convert.decode_delta(bits, entry.dtype, base, out)
        )
        if bad >= 0:
            raise NonFiniteError(
                f"'{entry.name}' in '{segment.path}' holds a NaN or an infinity at element {start + bad:,}"
            )
