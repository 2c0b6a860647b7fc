"""Files that end in a checksum of their own: compared once, when a file is opened and before anybody reads from it.

A chunk of a copied store is a file whose last four bytes are the crc32c of all others. What a run asks for are ranges
of elements, which begin and end anywhere in a chunk, so a range alone can't be checked. Opening is the moment to look
at the whole: every reader keeps its files open while it goes through them, the pages that were looked at are still in
the page cache when they are read a moment later, and the checksum itself runs at 20 GB/s.

What this does not notice: bytes that change after a file was opened; a run compares sizes and times at its end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import google_crc32c
import numpy as np

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, DamageError
from mergepipe.storage.header import open_regular

CHECKSUM_BYTES = 4
_STEP_BYTES = 256 * 1024


class CheckedFiles:
    """Opens files for reading; those below some folders only if their checksum is right. For any number of threads.

    Parameters
    ----------
    roots : iterable of path
        Folders of copied stores.

    Attributes
    ----------
    damaged : list of str
        Files whose checksum was found to be wrong, in the order in which they were opened.

    Examples
    --------
    >>> files = CheckedFiles(["/merge/stores/0-base/zarr"])
    >>> files.is_checked("/merge/stores/0-base/zarr/w/c.0.0"), files.is_checked("/models/base/model.safetensors")
    (True, False)
    """

    def __init__(self, roots: Iterable[str | Path] = ()) -> None:
        self.damaged: list[str] = []
        self._roots = tuple(os.path.join(root, "") for root in roots)

    def is_checked(self, path: str) -> bool:
        """Whether a file ends in its own checksum."""
        return bool(self._roots) and path.startswith(self._roots)

    def open(self, path: str) -> int:
        """A descriptor of a file, which the caller closes.

        Raises
        ------
        DamageError
            If its bytes do not match its checksum.
        CheckpointNotFoundError, CheckpointError
            As :func:`mergepipe.storage.header.open_regular`; or if the disk can't read it.
        """
        fd = open_regular(path)
        try:
            if self.is_checked(path) and not is_whole(fd):
                self.damaged.append(path)
                raise DamageError(
                    f"'{path}', a chunk of a copied store, does not match its checksum: `mergepipe build` makes it "
                    f"anew from the model's own files, and `mergepipe run` then goes on"
                )
        except OSError as error:
            os.close(fd)
            raise CheckpointError(f"'{path}' can't be read: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise
        return fd


def is_whole(fd: int) -> bool:
    """Whether the last four bytes of an open file are the crc32c of all before them. Takes 256 KiB of memory."""
    left = os.fstat(fd).st_size - CHECKSUM_BYTES
    if left < 0:
        return False
    piece = np.empty(min(_STEP_BYTES, max(left, 1)), np.uint8)
    checksum = at = 0
    while left:
        count = os.preadv(fd, [piece[: min(left, piece.size)].data], at)
        if count == 0:
            return False
        checksum = google_crc32c.extend(checksum, piece[:count])
        at, left = at + count, left - count
    return os.pread(fd, CHECKSUM_BYTES, at) == checksum.to_bytes(CHECKSUM_BYTES, "little")


def is_whole_file(path: str | Path) -> bool:
    """The same for a file by its path; False if there is none."""
    try:
        fd = open_regular(path)
    except CheckpointNotFoundError:
        return False
    try:
        return is_whole(fd)
    finally:
        os.close(fd)
