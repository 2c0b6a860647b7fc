"""What an extraction of an adapter is asked for, and what it has found so far, kept on disk tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Literal

from mergepipe.errors import OutputExistsError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.inputs import ONE_COMMAND, Inputs
from mergepipe.pipeline.lora import ADAPTER_CONFIG, ADAPTER_NAME, Part
from mergepipe.pipeline.models import InputModel
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.checkpoint import fingerprint
from mergepipe.storage.dtypes import DTYPES, MERGED_ALIASES

SPOOL = ".mergepipe-lora"
"""Folder in the output that holds what is done of an unfinished extraction."""

FORMAT = 1
"""Of what is in that folder, and of the numbers: raised with every change of either."""

Svd = Literal["auto", "exact"]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What an adapter is to hold.

    Attributes
    ----------
    rank : int
        Of each pair, at the most.
    include, exclude : tuple of str
        Regular expressions on tensor names: only tensors that one of `include` matches, if there are any, and none
        that one of `exclude` does.
    save : tuple of str
        Regular expressions: modules that are saved whole instead of as a pair.
    embed_lora : bool
        Whether embeddings get a pair, too, instead of being saved whole.
    skip_undecomposable : bool
        Whether what has no pair is left out rather than saved whole.
    sv_epsilon : float
        Singular values of at most this are left out.
    dtype : str or None
        "float32" and the like; each tensor's own in the base by default.
    svd : {'auto', 'exact'}
        'auto' finds less than a quarter of a matrix's components by a seeded range finder, which is much faster and
        next to the best; 'exact' always takes the best.
    """

    rank: int
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: tuple[str, ...] = ()
    embed_lora: bool = False
    skip_undecomposable: bool = False
    sv_epsilon: float = 0.0
    dtype: str | None = None
    svd: Svd = "auto"


@dataclass(frozen=True, slots=True)
class Kept:
    """What was found out about one tensor.

    Attributes
    ----------
    squared : float
        Squared norm of its update.
    values : tuple of float
        The singular values that its pair holds; empty if it has none.
    """

    squared: float
    values: tuple[float, ...] = ()

    @property
    def rank(self) -> int:
        """Of the pair."""
        return len(self.values)


class Spool:
    """One extraction: its inputs, and the folder of what is done.

    Parameters
    ----------
    base, other : InputModel
    output : Path
        The adapter's folder.
    wanted : Wanted
    parts : sequence of Part
        The tensors that are looked at.

    Attributes
    ----------
    inputs : Inputs
        The files that are read.

    Raises
    ------
    InputChangedError
        If one of them has changed since it was opened.
    """

    def __init__(
        self, base: InputModel, other: InputModel, output: Path, wanted: Wanted, parts: Sequence[Part]
    ) -> None:
        self.base = base
        self.inputs = Inputs([*base.stored.files, *other.stored.files], use=ONE_COMMAND)
        self.output = output
        self.wanted = wanted
        self.parts = tuple(parts)
        self.root = output / SPOOL
        models = [(fingerprint(model), repr(model.adjust)) for model in (base, other)]
        record = [FORMAT, version("mergepipe"), *models, repr(wanted)]
        self._id = hashlib.sha256(json.dumps(record).encode()).hexdigest()

    def dtype(self, name: str) -> str:
        """The safetensors dtype that a tensor is written in."""
        return MERGED_ALIASES[self.wanted.dtype].name if self.wanted.dtype else self.base.tensors[name].dtype

    def ours(self) -> list[str]:
        """Names that may be in the output folder already.

        Raises
        ------
        OutputExistsError
            If it holds unfinished work of another extraction.
        """
        if not self.root.is_dir():
            return []
        found = self._begun()
        if found not in (None, self._id):
            raise OutputExistsError(
                f"'{self.root}' holds unfinished work of another extraction: remove it, or choose another folder"
            )
        return [SPOOL, ADAPTER_CONFIG, ADAPTER_NAME, f"{ADAPTER_NAME}.part", outputs.CARD_NAME] if found else [SPOOL]

    def _begun(self) -> str | None:
        try:
            return (self.root / "job").read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def begin(self) -> None:
        """Say whose work the folder holds, before there is any."""
        if self._begun() is None:
            write_atomic(self.root / "job", self._id.encode())

    def most_bytes(self) -> int:
        """Disk that is needed at the most: what is kept, and the adapter."""
        pairs = whole = 0
        for part in self.parts:
            itemsize = DTYPES[self.dtype(part.name)].itemsize
            if part.has_pair:
                pairs += min(self.wanted.rank, *part.matrix) * sum(part.matrix) * itemsize
            elif part.form != "none":
                whole += prod(part.shape) * itemsize
        return 2 * pairs + whole

    def _file(self, part: Part) -> Path:
        return self.root / hashlib.sha256(part.name.encode()).hexdigest()[:32]

    def kept(self, part: Part) -> Kept | None:
        """What this or an earlier run found out about a tensor."""
        try:
            with open(self._file(part), "rb") as file:
                found = json.loads(file.readline())
        except FileNotFoundError:
            return None
        return Kept(found["squared"], tuple(found["values"]))

    def pair(self, part: Part) -> tuple[bytes, bytes]:
        """The encoded A and B of a tensor that has a pair."""
        with open(self._file(part), "rb") as file:
            split = json.loads(file.readline())["a"]
            return file.read(split), file.read()

    def keep(self, part: Part, kept: Kept, a: bytes = b"", b: bytes = b"") -> None:
        """Keep what was found, durably.

        Raises
        ------
        InputChangedError
            If an input is not what it was: what was found may be of other bytes.
        """
        self.inputs.check()
        head = json.dumps({"squared": kept.squared, "values": kept.values, "a": len(a)})
        write_atomic(self._file(part), b"".join((head.encode(), b"\n", a, b)))
