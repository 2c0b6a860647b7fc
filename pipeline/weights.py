"""The values of a model, window by window, as a merge would see them: scales multiplied in, an adapter added."""

from __future__ import annotations

import threading

import numpy as np

from mergepipe.errors import NonFiniteError
from mergepipe.pipeline.models import InputModel, stored_of
from mergepipe.storage.checkpoint import Checkpoint
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import virtual_manifest
from mergepipe.storage.readers import Reader
from mergepipe.tasks.adjust import held_bytes
from mergepipe.tasks.convert import decode, decode_delta
from mergepipe.tasks.method import Array
from mergepipe.tasks.sources import TensorSource


class Weights:
    """Reads the values of one model. Safe to use from several threads at once.

    Parameters
    ----------
    model : Checkpoint
        What is stored in it is read as it is; of an :class:`mergepipe.pipeline.models.InputModel` what it stands for.
    reader : Reader
    remedy : str
        What to do about a value that is not finite: the end of the message.
    """

    def __init__(self, model: Checkpoint, reader: Reader, remedy: str) -> None:
        self._label = str(model.reference if isinstance(model, InputModel) else model.root)
        self._remedy = remedy
        self._adjust = model.adjust if isinstance(model, InputModel) else {}
        self._manifest = virtual_manifest(stored_of(model))
        self._reader = reader
        self._lock = threading.Lock()
        self._sources: dict[tuple[str, str], TensorSource] = {}

    def read(self, name: str, start: int, out: Array, base: Array | None = None) -> None:
        """Values from a flat index on; less those of a base, if it is given.

        Parameters
        ----------
        name : str
        start : int
        out : float32 or float64 ndarray, shape (n,)
            Overwritten.
        base : ndarray like `out`, optional

        Raises
        ------
        NonFiniteError
            If a value is a NaN or an infinity.
        """
        source = self._source(name, out.dtype)
        with self._reader.window(self._manifest.segments(name, start, start + out.size), last=False) as window:
            bits = window.view(DTYPES[source.dtype].bits)
            if base is None or source.adjuster is not None:
                bad = decode(bits, source.dtype, out)
            else:
                bad = decode_delta(bits, source.dtype, base, out)
        if bad < 0 and source.adjuster is not None:
            bad = source.adjuster.apply(start, out)
            if base is not None:
                np.subtract(out, base, out=out)
        if bad >= 0:
            raise NonFiniteError(
                f"'{name}' of '{self._label}' holds a NaN or an infinity at element {start + bad:,} (flat index, "
                f"row-major): {self._remedy}"
            )

    def release(self, name: str) -> None:
        """Let go of what was held to read a tensor."""
        with self._lock:
            for key in [key for key in self._sources if key[0] == name]:
                del self._sources[key]

    def _source(self, name: str, work: np.dtype[np.generic]) -> TensorSource:
        with self._lock:
            key = name, work.str
            if key not in self._sources:
                found = TensorSource(self._label, self._manifest, name, self._manifest.arrays[name].dtype)
                self._sources[key] = found.adjusted(self._adjust.get(name, ()), work, self._reader)
            return self._sources[key]


def reading_bytes(model: Checkpoint, name: str, itemsize: int) -> int:
    """Memory that reading one tensor holds between its windows."""
    adjust = model.adjust.get(name, ()) if isinstance(model, InputModel) else ()
    return held_bytes(adjust, model.tensors[name].shape, itemsize)
