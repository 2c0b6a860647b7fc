"""Where the values of an input tensor come from: stored bytes of some model, decoded and adjusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mergepipe.errors import NonFiniteError
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.readers import Reader
from mergepipe.tasks import convert
from mergepipe.tasks.adjust import Adjuster, Adjustment
from mergepipe.tasks.method import Array


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One input tensor: where its bytes are, and whose it is.

    Attributes
    ----------
    model : str
        The model's name, for messages.
    manifest : ChunkManifest
    name : str
        The tensor's name in that model.
    dtype : str
        Its safetensors dtype.
    adjuster : Adjuster or None
        What is to be done to its decoded values before they are the model's.
    """

    model: str
    manifest: ChunkManifest
    name: str
    dtype: str
    adjuster: Adjuster | None = None

    def adjusted(self, adjustments: Sequence[Adjustment], work: np.dtype[Any], reader: Reader) -> TensorSource:
        """The same tensor with adjustments, which take what they need through `reader`; itself if there are none."""
        if not adjustments:
            return self
        shape = self.manifest.arrays[self.name].shape

        def read(name: str, start: int, stop: int, out: Array) -> None:
            dtype = self.manifest.arrays[name].dtype
            with reader.window(self.manifest.segments(name, start, stop), last=False) as window:
                bad = convert.decode(window.view(DTYPES[dtype].bits), dtype, out)
            if bad >= 0:
                raise non_finite(name, self.model, start + bad)

        return replace(self, adjuster=Adjuster(adjustments, self.name, shape, work, read))

    def decode(self, bits: Array, start: int, out: Array) -> None:
        """Stored bits of the elements from `start` on to the values of the model.

        Raises
        ------
        NonFiniteError
            If one of them is a NaN or an infinity.
        """
        bad = convert.decode(bits, self.dtype, out)
        if bad < 0 and self.adjuster is not None:
            bad = self.adjuster.apply(start, out)
        if bad >= 0:
            raise non_finite(self.name, self.model, start + bad)

    def decode_delta(self, bits: Array, start: int, base: Array, out: Array) -> None:
        """The same, minus the base; raises as :meth:`decode`."""
        if self.adjuster is not None:
            self.decode(bits, start, out)
            np.subtract(out, base, out=out)
            return
        bad = convert.decode_delta(bits, self.dtype, base, out)
        if bad >= 0:
            raise non_finite(self.name, self.model, start + bad)


def non_finite(name: str, model: str, element: int) -> NonFiniteError:
    """The error to raise where an input is not a number."""
    return NonFiniteError(
        f"'{name}' of model '{model}' holds a NaN or an infinity at element {element:,} (flat index, row-major): "
        f"repair or leave out the model, or take this tensor from the base with a rule (`match`, "
        f"`merge_method: passthrough`)"
    )
