"""Rows of a tensor taken from many places: one more way from an element range to bytes.

A *row map* says for every row of an output which source holds it, and where. Through it a tensor whose rows are
permuted, extended or borrowed from other models is read like any other: nothing is copied, and no reader and no kernel
knows of it. Rows that stand nowhere yet are put into a small file of their own, which is one more source.

A row map is kept as runs, and one map serves all tensors of a model. What a window of a gathered tensor consists of is
worked out from it piece by piece while the window is read, so that a permutation of a hundred thousand rows takes no
more memory than the window itself and :data:`GATHER_BYTES`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, overload

import numpy as np
from numpy.typing import NDArray

from mergepipe.errors import WorkspaceError
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest, ManifestArray, Segment

if TYPE_CHECKING:
    from mergepipe.storage.readers import Descriptors

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

RUNS_AT_ONCE = 16384
"""Runs of rows whose places are worked out, sorted and read together."""

SPAN_BYTES = 1024 * 1024
"""Neighbouring pieces of a file are read in one call up to this far apart from the first byte to the last."""

GAP_BYTES = 16 * 1024
"""A gap between two pieces that is read along, since that is faster than another call."""

LONG_BYTES = 256 * 1024
"""A range this long is dropped from the page cache as soon as it is read, if the caller wants that."""

GATHER_BYTES = 6 * 1024 * 1024
"""What the reading of one gathered window takes beside the window: a span, and the table of its pieces."""

FEW_RUNS = 4
"""A window of so few runs is a plain list of segments; one of a single run can be mapped."""


@dataclass(frozen=True, eq=False, slots=True)
class RowMap:
    """Where the rows of a gathered tensor come from, as runs of neighbouring rows of one source.

    Attributes
    ----------
    rows : int
        Rows of the tensor.
    starts : int64 ndarray, shape (runs + 1,)
        First row of each run, and `rows`.
    sources : int64 ndarray, shape (runs,)
        Number of the source that holds the run.
    firsts : int64 ndarray, shape (runs,)
        Row of the source where the run begins.
    """

    rows: int
    starts: I64
    sources: I64
    firsts: I64

    @classmethod
    def of(cls, sources: NDArray[Any], rows: NDArray[Any]) -> Self:
        """The map of rows given one by one.

        Parameters
        ----------
        sources, rows : integer ndarray, shape (rows,)
            For each row of the tensor, the number of a source and the row in it.

        Examples
        --------
        >>> found = RowMap.of(np.array([0, 0, 1, 0]), np.array([4, 5, 6, 6]))
        >>> found.starts.tolist(), found.sources.tolist(), found.firsts.tolist()
        ([0, 2, 3, 4], [0, 1, 0], [4, 6, 6])
        """
        sources, rows = np.asarray(sources, np.int64), np.asarray(rows, np.int64)
        new = np.ones(len(rows), bool)
        new[1:] = (sources[1:] != sources[:-1]) | (rows[1:] != rows[:-1] + 1)
        first = np.flatnonzero(new)
        return cls(len(rows), np.append(first, len(rows)), sources[first], rows[first])

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return self.starts.nbytes + self.sources.nbytes + self.firsts.nbytes

    @property
    def digest(self) -> str:
        """Hash of what it says."""
        return hashlib.sha256(self.to_bytes()).hexdigest()[:32]

    def is_identity(self, source: int, rows: int) -> bool:
        """Whether it takes all `rows` rows of one source as they lie there."""
        return self.rows == rows and len(self.sources) == 1 and int(self.sources[0]) == source and not self.firsts[0]

    def to_bytes(self) -> bytes:
        """As it is saved: three arrays of little-endian int64, after numpy's own header."""
        file = io.BytesIO()
        for array in (self.starts, self.sources, self.firsts):
            np.save(file, array.astype("<i8"), allow_pickle=False)
        return file.getvalue()

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all."""
        write_atomic(path, self.to_bytes())

    @classmethod
    def load(cls, path: str | Path, digest: str) -> Self:
        """Read a map back that is known by its hash.

        Raises
        ------
        WorkspaceError
            If it is gone, damaged or another one.
        """
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError as error:
            raise WorkspaceError(f"the row map '{path}' is gone: build the workspace again") from error
        if hashlib.sha256(data).hexdigest()[:32] != digest:
            raise WorkspaceError(f"the row map '{path}' is not the one of the plan: build the workspace again")
        file = io.BytesIO(data)
        starts, sources, firsts = (np.load(file, allow_pickle=False).astype(np.int64) for _ in range(3))
        return cls(int(starts[-1]), starts, sources, firsts)


Part = tuple[ChunkManifest, str]


@dataclass(frozen=True, eq=False, slots=True)
class _Extents:
    """Where one source tensor lies: runs of its elements that are contiguous in a file, neighbours joined."""

    starts: I64
    files: I64
    offsets: I64

    @classmethod
    def of(cls, array: ManifestArray, first_file: int) -> Self:
        new = np.ones(len(array.files), bool)
        new[1:] = np.diff(array.files).astype(bool) | (array.offsets[1:] != array.offsets[:-1] + array.lengths[:-1])
        at = np.flatnonzero(new)
        return cls(np.append(array.starts[at], array.size), array.files[at] + first_file, array.offsets[at])

    def locate(self, begin: I64, length: I64, at: I64, itemsize: int) -> _Table:
        """Places of the elements `begin` to ``begin + length``; `at` is where they belong, in bytes of the window."""
        first = np.searchsorted(self.starts, begin, "right") - 1
        counts = np.searchsorted(self.starts, begin + length, "left") - first
        piece = np.repeat(np.arange(len(begin)), counts)
        extent = first[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
        low = np.maximum(begin[piece], self.starts[extent])
        high = np.minimum((begin + length)[piece], self.starts[extent + 1])
        return _Table(
            self.files[extent],
            self.offsets[extent] + (low - self.starts[extent]) * itemsize,
            (high - low) * itemsize,
            at[piece] + (low - begin[piece]) * itemsize,
        )


@dataclass(frozen=True, eq=False, slots=True)
class _Table:
    """Pieces of a window: number of the file, offset and length there, place in the window; all in bytes."""

    files: I64
    offsets: I64
    lengths: I64
    at: I64

    @classmethod
    def joined(cls, tables: Sequence[_Table]) -> Self:
        columns = zip(*((t.files, t.offsets, t.lengths, t.at) for t in tables), strict=True)
        return cls(*(np.concatenate(column) for column in columns))

    def sorted(self, *keys: I64) -> Self:
        """By the first key, then the next."""
        order = np.lexsort(keys[::-1])
        return type(self)(self.files[order], self.offsets[order], self.lengths[order], self.at[order])

    def spans(self) -> list[tuple[int, int]]:
        """For pieces in the order of the files, first and one past the last of those that one call reads."""
        ends = self.offsets + self.lengths
        apart = np.flatnonzero((np.diff(self.files) != 0) | (self.offsets[1:] - ends[:-1] > GAP_BYTES)) + 1
        found = []
        for first, last in itertools.pairwise([0, *apart.tolist(), len(ends)]):
            while last - first > 1:
                # Sources are read as they are asked for, so a row may be wanted twice: ends need not ascend.
                fits = int(np.searchsorted(self.offsets[first:last], self.offsets[first] + SPAN_BYTES, "left"))
                inside = ends[first : first + fits] <= self.offsets[first] + SPAN_BYTES
                count = max(1, fits if inside.all() else int(np.argmin(inside)))
                found.append((first, first + count))
                first += count
            if first < last:
                found.append((first, last))
        return found

    def part(self, first: int, last: int) -> Self:
        """Some of the pieces."""
        part = slice(first, last)
        return type(self)(self.files[part], self.offsets[part], self.lengths[part], self.at[part])


@dataclass(frozen=True, eq=False, slots=True)
class GatheredArray:
    """One tensor whose rows are gathered.

    Attributes
    ----------
    dtype : str
        Safetensors name of the type; every source has it.
    shape : tuple of int
    row_map : RowMap
        Of ``shape[0]`` rows.
    extents : dict of int to _Extents
        Where the tensor lies in each source that the map names.
    paths : tuple of str
        The files that the extents number.
    """

    dtype: str
    shape: tuple[int, ...]
    row_map: RowMap
    extents: dict[int, _Extents]
    paths: tuple[str, ...]

    @classmethod
    def of(cls, dtype: str, row: tuple[int, ...], row_map: RowMap, parts: Mapping[int, Part]) -> Self:
        """A tensor made of rows of others.

        Parameters
        ----------
        dtype : str
        row : tuple of int
            Shape of a row, also in every source.
        row_map : RowMap
        parts : mapping of int to (ChunkManifest, str)
            For each source that the map names, its manifest and the tensor's name there.
        """
        extents: dict[int, _Extents] = {}
        paths: list[str] = []
        for source in np.unique(row_map.sources).tolist():
            manifest, name = parts[source]
            extents[source] = _Extents.of(manifest.arrays[name], len(paths))
            paths += [info.path for info in manifest.files]
        return cls(dtype, (row_map.rows, *row), row_map, extents, tuple(paths))

    @property
    def width(self) -> int:
        """Elements of a row."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def segments(self, start: int, stop: int) -> Sequence[Segment]:
        """Bytes of the elements `start` to `stop`; see :meth:`mergepipe.storage.manifest.ChunkManifest.segments`."""
        size = self.row_map.rows * self.width
        if not 0 <= start <= stop <= size:
            raise ValueError(f"elements {start} to {stop} are not inside a gathered tensor of {size}")
        if start == stop:
            return []
        starts = self.row_map.starts
        first = int(np.searchsorted(starts, start // self.width, "right")) - 1
        last = int(np.searchsorted(starts, (stop - 1) // self.width, "right"))
        pieces = Pieces(self, start, stop, first, last)
        return list(pieces) if last - first <= FEW_RUNS else pieces


@dataclass(frozen=True, slots=True)
class Pieces(Sequence[Segment]):
    """The segments of a window of a gathered tensor, worked out when they are asked for.

    Two of them are equal if they are the same window of the same array. `first` to `last` are its runs of rows.
    """

    array: GatheredArray
    start: int
    stop: int
    first: int
    last: int

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return (self.stop - self.start) * DTYPES[self.array.dtype].itemsize

    def __len__(self) -> int:
        return sum(len(table.at) for table in self._tables())

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Segment]: ...
    def __getitem__(self, index: int | slice) -> Segment | Sequence[Segment]:
        return list(self)[index]

    def __iter__(self) -> Iterator[Segment]:
        for table in self._tables():
            table = table.sorted(table.at)
            columns = (table.files.tolist(), table.offsets.tolist(), table.lengths.tolist())
            for file, offset, length in zip(*columns, strict=True):
                yield Segment(self.array.paths[file], offset, length)

    def read_into(self, descriptors: Descriptors, out: U8, on_read: Callable[[Segment], None]) -> None:
        """Read all of them, neighbours in a file together.

        Parameters
        ----------
        descriptors : Descriptors
        out : uint8 ndarray, shape (nbytes,)
            Overwritten, in element order.
        on_read : callable
            Told each long range of a file that was read; what lies around short ones is most likely wanted later.
        """
        scratch = np.empty(SPAN_BYTES, np.uint8)
        for unsorted in self._tables():
            table = unsorted.sorted(unsorted.files, unsorted.offsets)
            bounds = [0, *(np.flatnonzero(np.diff(table.files)) + 1).tolist(), len(table.files)]
            for first, last in itertools.pairwise(bounds):
                path = self.array.paths[int(table.files[first])]
                _read_file(descriptors, path, table.part(first, last), out, scratch, on_read)

    def _tables(self) -> Iterator[_Table]:
        """The pieces of a bounded number of runs at a time."""
        width, itemsize = self.array.width, DTYPES[self.array.dtype].itemsize
        row_map = self.array.row_map
        for low in range(self.first, self.last, RUNS_AT_ONCE):
            high = min(low + RUNS_AT_ONCE, self.last)
            bounds = row_map.starts[low : high + 1] * width
            start, stop = np.maximum(bounds[:-1], self.start), np.minimum(bounds[1:], self.stop)
            begin = row_map.firsts[low:high] * width + start - bounds[:-1]
            sources, tables = row_map.sources[low:high], []
            for source in np.unique(sources).tolist():
                mine = sources == source
                at = (start[mine] - self.start) * itemsize
                extents = self.array.extents[source]
                tables.append(extents.locate(begin[mine], (stop - start)[mine], at, itemsize))
            yield _Table.joined(tables)


def _read_file(
    descriptors: Descriptors, path: str, table: _Table, out: U8, scratch: U8, on_read: Callable[[Segment], None]
) -> None:
    """Read pieces of one file, in its order, each span by one call if nothing is wrong."""
    spans = table.spans()
    ends = np.maximum.reduceat(table.offsets + table.lengths, [first for first, _ in spans]).tolist()
    begins, places = table.offsets.tolist(), table.at.tolist()
    memory, spare = out.data, scratch.data
    with descriptors.borrow(path) as fd:
        if hasattr(os, "posix_fadvise"):
            # All are asked for before the first is waited for: a disk serves scattered rows best many at a time.
            for (first, _), end in zip(spans, ends, strict=True):
                os.posix_fadvise(fd, begins[first], end - begins[first], os.POSIX_FADV_WILLNEED)
        for (first, last), end in zip(spans, ends, strict=True):
            begin, alone = begins[first], last - first == 1
            target = memory[places[first] : places[first] + end - begin] if alone else spare[: end - begin]
            if not _read_at_once(fd, target, begin):
                descriptors.read_into(Segment(path, begin, end - begin), target)
            if not alone:
                _scatter(table.part(first, last), scratch, out)
            if end - begin >= LONG_BYTES:
                on_read(Segment(path, begin, end - begin))


def _read_at_once(fd: int, target: memoryview, offset: int) -> bool:
    """Whether one call fills `target`; whoever is told that it does not reads with more care."""
    try:
        return os.preadv(fd, [target], offset) == len(target)
    except OSError:
        return False


def _scatter(span: _Table, scratch: U8, out: U8) -> None:
    """Put the pieces of a span where they belong."""
    offsets, lengths = span.offsets - span.offsets[0], span.lengths
    short = int(lengths[0])
    if short <= 8 and bool((lengths == short).all()):
        # Elements of a vector, or very short rows: a copy each would cost more than the copying.
        step = np.arange(short)
        out[span.at[:, None] + step] = scratch[offsets[:, None] + step]
        return
    for offset, length, at in zip(offsets.tolist(), lengths.tolist(), span.at.tolist(), strict=True):
        out[at : at + length] = scratch[offset : offset + length]


@dataclass(frozen=True, eq=False, slots=True)
class GatheredManifest(ChunkManifest):
    """The manifest of a model some of whose tensors are gathered; all others are as in its own.

    Attributes
    ----------
    gathered : dict of str to GatheredArray
    """

    gathered: dict[str, GatheredArray] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, as it is read."""
        return self.gathered[name].shape if name in self.gathered else self.arrays[name].shape

    def segments(self, name: str, start: int, stop: int) -> Sequence[Segment]:
        """Bytes of the elements `start` to `stop` of a flattened tensor, gathered or not."""
        if name in self.gathered:
            return self.gathered[name].segments(start, stop)
        return ChunkManifest.segments(self, name, start, stop)
