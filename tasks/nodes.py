"""The bodies of the graph's nodes: read a unit, compute, write it.

A *unit* is a run of whole blocks of one tensor. Its inputs are read through windows, block by block decoded into the
worker's own tile, handed to a reduction or to the kernel, and the encoded result is written at its planned offset.
Arrays never travel between nodes: a node returns nothing, what it found is in the accumulators and the state of its
:class:`TensorWork`, and Dask's edges only say what must come before what.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mergepipe.errors import CheckpointError, NonFiniteError
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import Reader
from mergepipe.storage.writer import PAGE
from mergepipe.tasks import convert
from mergepipe.tasks.blocks import SAMPLED_AHEAD, Blocks, block_bounds, sampled_every
from mergepipe.tasks.listed import Listed, Room
from mergepipe.tasks.method import (
    Accumulator,
    Array,
    Job,
    MergeMethod,
    Reduction,
    State,
    Tile,
    can_offload,
    expected_reads,
    is_sample,
    stored_sweep,
    values_listed,
)
from mergepipe.tasks.rows_torch import Scorer
from mergepipe.tasks.sources import TensorSource

T = TypeVar("T")


class Sink(Protocol):
    """Takes encoded bytes of one output tensor."""

    def unit(
        self, offset: int, nbytes: int, written: Callable[[], None]
    ) -> AbstractContextManager[npt.NDArray[np.uint8]]:
        """Memory for the bytes of the tensor from `offset` on, to be filled in a ``with`` block.

        They are written after the block, unless it raises, and `written` is called then, both on another thread.
        """

    def mask(self, model: int, start: int, bits: npt.NDArray[Any]) -> None:
        """Keep a model's mask, bool, of the elements from `start` on; before the elements themselves are written."""


class Nowhere:
    """The sink of a sweep that has no output."""

    def unit(
        self, offset: int, nbytes: int, written: Callable[[], None]
    ) -> AbstractContextManager[npt.NDArray[np.uint8]]:
        """Nothing is ever written."""
        raise AssertionError("a sweep of a round writes nothing")

    def mask(self, model: int, start: int, bits: npt.NDArray[Any]) -> None:
        """Nor that."""
        raise AssertionError("a sweep of a round writes nothing")


class WorkerBuffers(threading.local):
    """Arrays that each worker thread allocates once and uses again: nothing is allocated in the hot path."""

    def __init__(self) -> None:
        self._flat: dict[str, npt.NDArray[np.uint8]] = {}

    def get(self, role: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with undefined contents, valid until this thread asks for the same role again."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        flat = self._flat.get(role)
        if flat is None or flat.nbytes < nbytes + PAGE:
            flat = self._flat[role] = np.empty(nbytes + PAGE, np.uint8)
        start = -flat.ctypes.data % PAGE
        array: Array = flat[start : start + nbytes].view(dtype).reshape(shape)
        return array


class Turn:
    """How far a tensor has come: its sweeps, then its output, and the next unit of that. It only ever moves on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.at = (0, 0)

    def reach(self, stage: int, unit: int) -> None:
        """Units of a stage are begun one after another, but whoever begins one may be late to say so."""
        with self._lock:
            self.at = max(self.at, (stage, unit))


class TensorWork:
    """One tensor on its way through its sweeps and its kernel.

    Parameters
    ----------
    job : Job
    method : MergeMethod
    base : TensorSource or None
    models : sequence of TensorSource
        One per model, in recipe order.
    out_dtype : str
        safetensors dtype of the output.
    units : sequence of (int, int)
        First block and one past the last block of each unit of the output that is to be made.
    reader : Reader
    sink : Sink
    buffers : WorkerBuffers
    stop : callable
        Raises if the run is to end; asked before each unit.
    report : callable
        ``report(stage, nbytes)`` is called when a unit is done, with the bytes it read and wrote.
    sweep_units : sequence of (int, int), optional
        Units of the reductions, which always cover the whole tensor; `units` by default.
    state : State, optional
        What the reductions found in an earlier run: they are not made again.
    on_state : callable, optional
        Told the state when the last reduction is done.
    resident : bool
        Whether the reader shall keep what the reductions read until the kernel has read it too.
    shared : State, optional
        What rounds have found out about the whole model: the reductions start from it.
    sweeps : sequence of Reduction, optional
        For a sweep of a round: its reductions, in place of the method's.
    scorer : Scorer, optional
        A device that helps with the reductions that can do with one.
    carried : TensorSource, optional
        What an earlier merge, or an earlier stage of this one, has carried over: a task vector, no model.
    importances : sequence of TensorSource, optional
        One per model, for a method that takes them.
    room : Room, optional
        Where sweeps take what they list from; all of it by default.
    """

    steps: tuple[str, ...] = ()

    def __init__(
        self,
        job: Job,
        method: MergeMethod,
        base: TensorSource | None,
        models: Sequence[TensorSource],
        out_dtype: str,
        units: Sequence[tuple[int, int]],
        reader: Reader,
        sink: Sink,
        buffers: WorkerBuffers,
        stop: Callable[[], None],
        report: Callable[[str, int], None],
        sweep_units: Sequence[tuple[int, int]] | None = None,
        state: State | None = None,
        on_state: Callable[[State], None] | None = None,
        resident: bool = True,
        shared: State | None = None,
        sweeps: Sequence[Reduction] | None = None,
        scorer: Scorer | None = None,
        carried: TensorSource | None = None,
        importances: Sequence[TensorSource] = (),
        room: Room | None = None,
    ) -> None:
        self.job = job
        self.method = method
        self.base = base
        self.carried = carried
        self.models = tuple(models)
        self.importances = tuple(importances)
        self.out = DTYPES[out_dtype]
        self.units = tuple(units)
        self.sweep_units = self.units if sweep_units is None else tuple(sweep_units)
        own = method.reductions(job) if sweeps is None else tuple(sweeps)
        self.sweeps: tuple[Reduction, ...] = own if state is None else ()
        self.state: State = (shared or {}) if state is None else state
        self._on_state = on_state
        self._resident = resident
        self._reader = reader
        self._sink = sink
        self._buffers = buffers
        self._stop = stop
        self._report = report
        self._scorer = scorer
        self._room = Room(job.listed) if room is None else room
        self._lock = threading.Lock()
        plain = all(source.dtype == "BF16" and source.adjuster is None for source in self.sources)
        self._all_bf16 = plain and job.work == np.float32
        self._backwards = self._passes()[-1 if self.units else -2 :: -2]
        self._accumulators: dict[int, Accumulator] = {}
        self._places: dict[tuple[int, int], list[Sequence[Segment]]] = {}
        self._turn = Turn()

    @property
    def sources(self) -> tuple[TensorSource, ...]:
        """Everything that is read: the base first, if there is one; importances and what was carried over last."""
        first = () if self.base is None else (self.base,)
        return (*first, *self.models, *self.importances, *(() if self.carried is None else (self.carried,)))

    def begin_sample(self) -> None:
        """Tell the reader what a sample will ask for first."""
        self._announce(self._samples(), slice(SAMPLED_AHEAD))

    def begin(self) -> None:
        """Tell the reader what will be asked for after that."""
        self._announce(self._samples(), slice(SAMPLED_AHEAD, None))
        expected = self._passes()[: 1 if self._resident else None]
        self._announce(expected)
        # What is read once is announced once.
        if not (expected and self._resident and self.units == self.sweep_units):
            self._reader.ahead(self._segments(blocks) for blocks in self.units)

    def _passes(self) -> list[int]:
        """Sweeps that are expected to read all there is, by their numbers; others hardly ever come, or are samples."""
        whole = (n for n, sweep in enumerate(self.sweeps) if expected_reads([sweep], self.job))
        return [n for n in whole if not self._is_looked_at_in_part(self.sweeps[n])]

    def _samples(self) -> list[int]:
        """Sweeps that read a part, likewise."""
        return [n for n, sweep in enumerate(self.sweeps) if self._is_looked_at_in_part(sweep)]

    def _announce(self, sweeps: Iterable[int], which: slice = slice(None)) -> None:
        units = ((n, self._unit_of(n, unit)) for n in sweeps for unit in range(len(self.sweep_units))[which])
        looks = (self._looked_at(self.sweeps[n], blocks) for n, blocks in units)
        self._reader.ahead(self._segments(blocks) for blocks in chain.from_iterable(looks))

    def _unit_of(self, sweep: int, unit: int) -> Blocks:
        """What a sweep takes as its `unit`-th unit.

        Where the reader can't keep all of them, passes go back and forth, and what comes last from the first to the
        last: so each begins with what the one before it came to last, which is kept, unless that one was not needed.
        """
        return self.sweep_units[-1 - unit if not self._resident and sweep in self._backwards else unit]

    def is_at_hand(self) -> bool:
        """Whether the reader has what the next unit needs, or needs nothing.

        What is made only now and then is not announced, and not at hand before an earlier tensor is done.
        """
        return all(self._reader.holds(self._segments(blocks)) for blocks in self._next_parts())

    def _next_parts(self) -> list[Blocks]:
        """What the next unit will ask for, part by part."""
        stage, unit = self._turn.at
        if stage == len(self.sweeps):
            return [self.units[unit]] if unit < len(self.units) else []
        if unit == len(self.sweep_units) or not self.sweeps[stage].needed(self.job, self.state):
            return []
        return self._looked_at(self.sweeps[stage], self._unit_of(stage, unit))

    def end(self) -> None:
        """Tell the reader that nothing will be asked for any more."""
        units = {*self.units, *self.sweep_units} if self.sweeps else self.units
        self._reader.forget(segments for blocks in units for segments in self._segments(blocks))
        self._release()

    def _release(self) -> None:
        for source in self.sources:
            if source.adjuster is not None:
                source.adjuster.release()

    def reduce(self, sweep: int, unit: int, *_after: object) -> None:
        """Add one unit to the accumulators of a sweep; nothing to do where the state answers it already."""
        reduction = self.sweeps[sweep]
        self._turn.reach(sweep, unit + 1)
        if reduction.needed(self.job, self.state):
            self._stop()
            self._sweep(reduction, sweep, unit)
        elif not self._resident and expected_reads([reduction], self.job):
            # What is kept until the last use is announced once, whoever uses it first.
            looks = self._looked_at(reduction, self._unit_of(sweep, unit))
            self._reader.skip([self._segments(blocks) for blocks in looks])
        nbytes = self._input_bytes(self._unit_of(sweep, unit))
        self._report(reduction.name, int(expected_reads([reduction], self.job) * nbytes))

    def _sweep(self, reduction: Reduction, sweep: int, unit: int) -> None:
        total = self._accumulator(sweep, reduction)
        counts = None
        if total.counts is not None:
            counts = total.counts
            if len(self.sweep_units) > 1:
                counts = self._buffers.get("counts", total.counts.shape, np.int64)
                counts.fill(0)
        mine = Accumulator(counts, total.blocks, total.listed)
        looks = self._looked_at(reduction, self._unit_of(sweep, unit))
        if self._scorer is not None and can_offload(reduction):
            for blocks in looks:
                tiles = self._tiles(blocks, last=not self._resident)
                reduction.offload(self.job, self.state, mine, tiles, self._scorer)
        elif not self._sweep_stored(reduction, looks, mine):
            for tile in chain.from_iterable(self._tiles(blocks, last=not self._resident) for blocks in looks):
                reduction.update(self.job, self.state, mine, tile)
        if counts is not None and counts is not total.counts:
            with self._lock:
                total.counts += counts

    def _sweep_stored(self, reduction: Reduction, looks: Sequence[Blocks], mine: Accumulator) -> bool:
        """Whether a sweep of some blocks was made from their stored bits; if not, they have left nothing behind."""
        stored = stored_sweep(reduction, self.job, self.state) if self._all_bf16 else None
        if stored is None:
            return False
        if all(self._run_stored(stored, blocks, mine, last=not self._resident) for blocks in looks):
            return True
        if mine.counts is not None:
            mine.counts.fill(0)
        if mine.blocks is not None:
            for first, after in looks:
                mine.blocks[first:after] = 0.0
        return False

    def _looked_at(self, reduction: Reduction, blocks: tuple[int, int]) -> list[tuple[int, int]]:
        """The parts of a unit that a sweep is given: all of it, or a few blocks if they are read for a sample alone."""
        if self._is_looked_at_in_part(reduction):
            every = sampled_every(self.job.blocks)
            return [(block, block + 1) for block in range(-(-blocks[0] // every) * every, blocks[1], every)]
        return [blocks]

    def _is_looked_at_in_part(self, reduction: Reduction) -> bool:
        return not self._resident and is_sample(reduction)

    def combine(self, sweep: int, *_after: object) -> None:
        """Turn what a sweep collected into new entries of the state."""
        reduction = self.sweeps[sweep]
        if reduction.needed(self.job, self.state):
            accumulator = self._accumulator(sweep, reduction)
            self.state = {**self.state, **reduction.combine(self.job, self.state, accumulator)}
            self._accumulators.pop(sweep, None)
            if accumulator.listed is not None:
                accumulator.listed.close()
        self._turn.reach(sweep + 1, 0)
        if sweep == len(self.sweeps) - 1 and self._on_state is not None:
            self._on_state(self.state)

    def apply(self, unit: int, *_after: object) -> None:
        """Compute one unit of the output and have it written."""
        self._turn.reach(len(self.sweeps), unit + 1)
        start, stop = self._bounds(self.units[unit])
        stored = self.method.stored(self.job, self.state) if self._all_bf16 and self.out.name == "BF16" else None
        with self._unit_of_output(start, stop, self._input_bytes(self.units[unit])) as out:
            self._stop()  # now: there may not have been room for a while
            if stored is None or not self._run_stored(stored, self.units[unit], out, last=True):
                self._run_tiles(unit, out)

    @contextmanager
    def _unit_of_output(self, start: int, stop: int, bytes_read: int) -> Iterator[Array]:
        """Memory for the encoded elements from `start` to `stop`, which are written after the block."""
        nbytes = (stop - start) * self.out.itemsize
        report = partial(self._report, "apply", bytes_read + nbytes)
        with self._sink.unit(start * self.out.itemsize, nbytes, report) as raw:
            yield raw.view(self.out.bits)

    def _run_stored(
        self, body: Callable[[list[Array], T, Blocks], bool], blocks: Blocks, out: T, *, last: bool
    ) -> bool:
        """Hand a unit's stored bits to `body` as they are; its answer."""
        with self._reader.windows(self._segments(blocks), last=last) as windows:
            return body([self._aligned(i, raw) for i, raw in enumerate(windows)], out, blocks)

    def _run_tiles(self, unit: int, out: Array) -> None:
        """Decode a unit block by block, hand each to the kernel, and encode what it makes of it."""
        start = self._bounds(self.units[unit])[0]
        merged = self._buffers.get("merged", (self._longest(),), self.job.work)
        for tile in self._tiles(self.units[unit], last=True):
            n = tile.values.shape[1]
            self.method.kernel(self.job, self.state, tile, merged[:n])
            if self.method.masks is not None:
                for model, bits in enumerate(self.method.masks(self.job, self.state, tile)):
                    self._sink.mask(model, tile.start, bits)
            at = tile.start - start
            self._encode(merged[:n], tile.start, out[at : at + n])

    def _encode(self, merged: Array, start: int, out: Array) -> None:
        """Round once, to the output's dtype; `merged` begins at element `start`."""
        overflow = convert.encode(merged, self.out.name, out)
        if overflow >= 0:
            wider = {"F16": "bfloat16` or float32", "BF16": "float32`"}.get(self.out.name, "float64`")
            raise NonFiniteError(
                f"'{self.job.name}' overflows {self.out.alias} at element {start + overflow:,} "
                f"(value {float(merged[overflow]):.6g}): write a wider type with `dtype: {wider}"
            )
        finite = np.isfinite(merged)
        if not finite.all():
            raise NonFiniteError(
                f"'{self.job.name}' overflows {self.job.work.name} while it is merged, at element "
                f"{start + int(np.argmin(finite)):,}, though all inputs are finite: lower the weights, or take this "
                f"tensor from the base with a rule (`match`, `merge_method: passthrough`)"
            )

    def _input_bytes(self, blocks: tuple[int, int]) -> int:
        start, stop = self._bounds(blocks)
        return (stop - start) * sum(DTYPES[source.dtype].itemsize for source in self.sources)

    def _bounds(self, blocks: tuple[int, int]) -> tuple[int, int]:
        """First element and one past the last of a run of blocks."""
        return block_bounds(self.job.shape, blocks[0])[0], block_bounds(self.job.shape, blocks[1] - 1)[1]

    def _longest(self) -> int:
        start, stop = block_bounds(self.job.shape, 0)
        return stop - start

    def decoded(self, blocks: tuple[int, int]) -> Array:
        """The values of the first model in a run of blocks: a new float64 array, shape (n,)."""
        start, stop = self._bounds(blocks)
        out = np.empty(stop - start, np.float64)
        for tile in self._tiles(blocks, last=False):
            out[tile.start - start :][: tile.values.shape[1]] = tile.values[0]
        return out

    def _accumulator(self, sweep: int, reduction: Reduction) -> Accumulator:
        with self._lock:
            if sweep not in self._accumulators:
                counts, row = reduction.shapes(self.job)
                most = values_listed([reduction], self.job)
                self._accumulators[sweep] = Accumulator(
                    None if counts is None else np.zeros(counts, np.int64),
                    None if row is None else np.zeros((self.job.blocks, *row), np.float64),
                    Listed(most, self._room) if most else None,
                )
            return self._accumulators[sweep]

    def _tiles(self, blocks: tuple[int, int], *, last: bool) -> Iterator[Tile]:
        """The blocks of a unit, one after another, decoded into this worker's buffers."""
        start = self._bounds(blocks)[0]
        job, longest = self.job, self._longest()
        with self._reader.windows(self._segments(blocks), last=last) as windows:
            stored = [self._aligned(i, raw) for i, raw in enumerate(windows)]
            base_row = self._buffers.get("base", (longest,), job.work)
            values = self._buffers.get("values", (job.models, longest), job.work)
            scratch = self._buffers.get("scratch", (self.method.scratch_rows, longest), job.work)
            carried = None if self.carried is None else self._buffers.get("carried", (longest,), job.work)
            for index in range(*blocks):
                first, after = block_bounds(job.shape, index)
                part = slice(first - start, after - start)
                tile = self._decode(stored, index, first, part, base_row, values, scratch)
                if carried is not None and self.carried is not None:
                    tile.carried = carried[: after - first]
                    self.carried.decode(stored[-1][part], first, tile.carried)
                yield tile

    def _decode(
        self,
        stored: Sequence[Array],
        index: int,
        first: int,
        part: slice,
        base_row: Array,
        values: Array,
        scratch: Array,
    ) -> Tile:
        n = part.stop - part.start
        # Contiguous rows of a shorter last block: the tile is a fresh view on the front of the same memory.
        tile_values = values.reshape(-1)[: self.job.models * n].reshape(self.job.models, n)
        tile_scratch = scratch.reshape(-1)[: self.method.scratch_rows * n].reshape(self.method.scratch_rows, n)
        base = None
        rows = stored
        if self.base is not None:
            base = base_row[:n]
            self.base.decode(stored[0][part], first, base)
            rows = stored[1:]
        rows, others = rows[: self.job.models], rows[self.job.models :]
        for k, (source, row) in enumerate(zip(self.models, rows, strict=True)):
            if base is not None and self.method.space == "deltas":
                source.decode_delta(row[part], first, base, tile_values[k])
            else:
                source.decode(row[part], first, tile_values[k])
        importance = self._decode_importances(others, first, part) if self.importances else None
        return Tile(index, first, base, tile_values, tile_scratch, importance=importance)

    def _decode_importances(self, rows: Sequence[Array], first: int, part: slice) -> Array:
        n = part.stop - part.start
        flat = self._buffers.get("importance", (self.job.models * self._longest(),), self.job.work)
        values = flat[: self.job.models * n].reshape(self.job.models, n)
        for k, (source, row) in enumerate(zip(self.importances, rows[: len(self.importances)], strict=True)):
            source.decode(row[part], first, values[k])
            if n and values[k].min() < 0:
                at = first + int(np.argmin(values[k]))
                raise CheckpointError(
                    f"'{source.name}' of the importances '{source.model}' is negative at element {at:,} "
                    f"({values[k].min():.6g}): expected a diagonal Fisher information or the like, none below 0"
                )
        return values

    def _segments(self, blocks: tuple[int, int]) -> list[Sequence[Segment]]:
        """For each source, where a run of blocks is: asked for when it is announced, at each pass, and in the end."""
        found = self._places.get(blocks)
        if found is None:
            start, stop = self._bounds(blocks)
            found = [source.manifest.segments(source.name, start, stop) for source in self.sources]
            self._places[blocks] = found
        return found

    def _aligned(self, number: int, raw: npt.NDArray[np.uint8]) -> Array:
        """The stored values of a window of source `number`; copied where the file has them at an odd address."""
        bits = DTYPES[self.sources[number].dtype].bits
        if raw.ctypes.data % bits.itemsize:
            copy = self._buffers.get(f"aligned{number}", raw.shape, np.uint8)
            copy[:] = raw
            raw = copy
        return raw.view(bits)
