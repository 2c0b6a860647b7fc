"""Bit masks beside a merge: one file per task, written in any order, by any worker.

A safetensors file of U8 tensors. Bit ``i % 8`` (counting from the lowest) of byte ``i // 8`` belongs to element ``i``
of the flattened tensor; the last byte is padded with zeros. A byte that two pieces share is put together under a lock:
pieces only ever set bits, and set the same ones when they are written again, so it does not matter who comes first, nor
how often.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mergepipe.storage.atomic import no_room_errors
from mergepipe.storage.layout import OutputTensor, ShardLayout, lay_out
from mergepipe.storage.writer import allocate, take_up

MASKS_NAME = "masks.safetensors"


def mask_layout(sizes: Mapping[str, int], metadata: Mapping[str, str]) -> ShardLayout:
    """The file of one task's masks.

    Parameters
    ----------
    sizes : mapping of str to int
        Elements of each tensor that has a mask.
    metadata : mapping of str to str

    Examples
    --------
    >>> [(t.name, t.shape) for t in mask_layout({"w": 9}, {}).tensors]
    [('w', (2,))]
    """
    tensors = [OutputTensor(name, "U8", (-(-size // 8),)) for name, size in sizes.items()]
    return replace(lay_out([tensors], metadata).shards[0], file=MASKS_NAME)


def unpack(raw: npt.NDArray[np.uint8], start: int, count: int) -> npt.NDArray[np.bool_]:
    """The bits of `count` elements from element `start` on, given the bytes from ``start // 8`` on.

    Examples
    --------
    >>> unpack(np.array([0b101, 0b1], np.uint8), 2, 7).astype(int).tolist()
    [1, 0, 0, 0, 0, 0, 1]
    """
    lead = start % 8
    return np.unpackbits(raw, count=lead + count, bitorder="little")[lead:].astype(bool)


class MaskWriter:
    """Writes one task's masks; threads may write pieces at once.

    Parameters
    ----------
    folder : Path
        Made if it does not exist. A file that an earlier run has finished there is taken up again.
    layout : ShardLayout
    """

    def __init__(self, folder: Path, layout: ShardLayout) -> None:
        self._writer = take_up(folder, layout)
        self._places = {tensor.name: tensor.offset for tensor in layout.tensors}
        self._edges = os.open(self._writer.part, os.O_RDWR | os.O_CLOEXEC)
        self._lock = threading.Lock()

    def write(self, name: str, start: int, bits: npt.NDArray[np.bool_]) -> None:
        """Set the bits of a tensor's elements from `start` on."""
        if not bits.size:
            return
        stop = start + bits.size
        lead = start % 8
        packed = np.packbits(np.concatenate([np.zeros(lead, bool), bits]), bitorder="little")
        first, last = (1 if lead else 0), packed.size - (1 if stop % 8 and packed.size > bool(lead) else 0)
        at = self._places[name] + start // 8
        if last > first:
            self._writer.write(at + first, packed[first:last])
        for position in {*range(first), *range(last, packed.size)}:
            self._join(at + position, packed[position : position + 1])

    def _join(self, at: int, byte: npt.NDArray[Any]) -> None:
        with self._lock:
            found = np.frombuffer(os.pread(self._edges, 1, at), np.uint8)
            os.pwrite(self._edges, (found | byte).tobytes(), at)

    def sync(self) -> None:
        """Make everything written so far durable."""
        self._writer.sync()

    def finish(self) -> None:
        """All pieces are there: check the file and give it its name."""
        self._writer.seal(sha256=False)
        os.close(self._edges)
        self._edges = -1
        self._writer.publish()

    def close(self) -> None:
        """Give the file descriptors back."""
        if self._edges >= 0:
            os.close(self._edges)
            self._edges = -1
        self._writer.close()


def reserve_masks(folder: Path, nbytes: int) -> None:
    """Set disk space aside for a file of masks whose header is not known yet; its unfinished file holds the space.

    Raises
    ------
    DiskFullError
    """
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{MASKS_NAME}.part"
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with no_room_errors(part):
            allocate(fd, nbytes)
    finally:
        os.close(fd)


def masks_exist(folder: Path) -> bool:
    """Whether the file of a task is there, finished or not."""
    return any((folder / f"{MASKS_NAME}{end}").exists() for end in ("", ".part"))
