"""The output shards of a run: opened, filled, sealed as they are complete, handed over if the user asks for it.

Workers fill memory that :mod:`mergepipe.storage.outgoing` lends them, and its threads write it: a unit is done when it
is written, a tensor when its last unit is. Sealing happens on a thread of its own, beside the work on the next shard,
in this order: commit what was written, make the file durable and complete its checksums, record that in the journal,
rename. Once the record is there, the file is whole under one of its two names.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from mergepipe.errors import Interrupted
from mergepipe.pipeline.commits import Committer, DoneUnit
from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.events import Announcer, ShardSealed
from mergepipe.pipeline.handover import SHARDS_OPEN, hand_over, handed_record
from mergepipe.pipeline.masks import TaskMasks
from mergepipe.pipeline.memory import UNITS_BEHIND
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.resume import Progress, merged, sealed_record
from mergepipe.storage.digest import Held
from mergepipe.storage.journal import Journal
from mergepipe.storage.layout import OutputLayout, PlacedTensor
from mergepipe.storage.outgoing import U8, Outgoing
from mergepipe.storage.writer import PAGE, SealedShard, ShardWriter, publish_part, sync_folder
from mergepipe.tasks.method import Array

logger = logging.getLogger(__name__)

BACKLOG_BYTES = 16 * 1024 * 1024
"""So much of a shard is hashed late before it is read back: where one unit took long, those behind it may have been let
go unhashed, and until they are read back nothing after them is hashed in passing."""


class Shards:
    """All shards of one run.

    Parameters
    ----------
    plan : Plan
    layout : OutputLayout
    progress : Progress
        What earlier runs have done.
    journal : Journal
    masks : TaskMasks
        Written beside the shards, made durable with them.
    drivers : Drivers
        Told of failures; asked whether to stop.
    announce : Announcer
    check_inputs : callable
        Raises if an input is not what it was when the run began.
    workers : int
        How many threads make units of output.
    sha256 : bool
    on_shard : str or None
        The user's command for each complete shard.

    Attributes
    ----------
    committer : Committer
    handed : set of int
        Numbers of the shards that the user's command has taken.
    """

    def __init__(
        self,
        plan: Plan,
        layout: OutputLayout,
        progress: Progress,
        journal: Journal,
        masks: TaskMasks,
        drivers: Drivers,
        announce: Announcer,
        check_inputs: Callable[[], None],
        *,
        workers: int,
        sha256: bool,
        on_shard: str | None,
    ) -> None:
        self._plan = plan
        self._layout = layout
        self._places = layout.places
        self._folder = Path(plan.output)
        self._progress = progress
        self._masks = masks
        self._drivers = drivers
        self._announce = announce
        self._sha256 = sha256
        self._on_shard = on_shard
        self.handed = set(progress.handed)
        self._lock = threading.Lock()
        self._writers: dict[int, ShardWriter] = {}
        self._unfinished: set[int] = set()
        self._followed: set[int] = set()
        self._held = Held()
        self._sealed: list[Future[SealedShard]] = []
        self._open_tensors = {number: 0 for number in range(len(layout.shards)) if number not in progress.sealed}
        self.committer = Committer(journal, self._sync, drivers.fail, check_inputs)
        self._outgoing = Outgoing(workers + UNITS_BEHIND, drivers.fail)
        self._sealer = ThreadPoolExecutor(1, "mergepipe-seal")

    def open(self) -> None:
        """Allocate every shard that is not complete; give those their names that were sealed but not renamed.

        With a command for complete shards they are allocated one by one, when the first of their tensors is due.
        """
        for number, shard in enumerate(self._layout.shards):
            if number not in self._progress.sealed:
                if self._on_shard is None:
                    self._writer(number)
            elif len(self._layout.shards) > 1 and number not in self._progress.handed:
                publish_part(self._folder / shard.file)
        sync_folder(self._folder)

    def expect(self, tensor: int) -> None:
        """A tensor is still to be made."""
        self._open_tensors[self.shard_of(tensor)] += 1

    def start(self) -> None:
        """Go on with what earlier runs left to do after the last tensor of a shard."""
        left = sorted(self._progress.sealed.keys() - self._progress.handed)
        begun = {self.shard_of(tensor) for tensor in self._progress.written} - self._progress.sealed.keys()
        self._unfinished.update(left, begun)
        for number in left:
            self._sealer.submit(self._hand_over, number)
        for number in [number for number, count in self._open_tensors.items() if count == 0]:
            self._seal(number)

    def shard_of(self, tensor: int) -> int:
        """Number of the shard that a tensor lies in."""
        return self._places[self._plan.tensors[tensor].name].shard

    def place_of(self, tensor: int) -> tuple[int, int]:
        """Number of the shard that a tensor lies in, and its offset there."""
        place = self._places[self._plan.tensors[tensor].name]
        return place.shard, place.offset

    def is_sealed(self, tensor: int) -> bool:
        """Whether an earlier run has completed the tensor's shard."""
        return self.shard_of(tensor) in self._progress.sealed

    def make_room(self, tensor: int) -> None:
        """Wait until the tensor's shard may be opened: each one takes up its whole size on disk.

        It waits for shards before it alone, as their tensors come before its own.
        """
        shard = self.shard_of(tensor)
        while self._on_shard is not None and shard not in self._writers and self._before(shard) >= SHARDS_OPEN:
            self._drivers.check_stop()
            time.sleep(0.02)
        self._drivers.check_stop()
        self._writer(shard)

    def _before(self, shard: int) -> int:
        """How many unfinished shards are before this one."""
        return sum(other < shard for other in self._unfinished.copy())

    def sink(self, tensor: int) -> Sink:
        """Where the units of a tensor are written to; its shard is opened by the first of them, unless it is."""
        place = self._places[self._plan.tensors[tensor].name]
        writer = partial(self._writer, place.shard)
        return Sink(tensor, place, writer, self._outgoing, self.committer, self._masks, self._catch_up)

    def when_written(self, tensor: int, done: Callable[[], None]) -> None:
        """All units of a tensor are made: call `done` once they are written, and seal its shard if it was the last."""
        self._outgoing.when_written(tensor, partial(self._finish, tensor, done))

    def _finish(self, tensor: int, done: Callable[[], None]) -> None:
        done()
        shard = self.shard_of(tensor)
        with self._lock:
            self._open_tensors[shard] -= 1
            complete = self._open_tensors[shard] == 0
        if complete:
            self._seal(shard)
        else:
            self._sealer.submit(self._follow, shard)

    def commit(self) -> None:
        """Write and record everything made so far; if that failed, raise what it failed with."""
        self.drain()
        self._drivers.raise_failure()
        try:
            self.committer.commit()
        except Interrupted as error:
            raise error.__cause__ or error from None

    def drain(self) -> None:
        """Write everything made so far."""
        self._outgoing.drain()

    def all_sealed(self) -> list[SealedShard]:
        """Wait for the sealing of all shards; those of earlier runs included."""
        try:
            sealed = [future.result() for future in self._sealed]
        except Interrupted:
            self._drivers.raise_failure()
            raise
        return sorted([*sealed, *self._progress.sealed.values()], key=lambda shard: shard.file)

    def close(self) -> None:
        """End the threads, commit what is written, and close the files. Unfinished shards stay as they are."""
        self._outgoing.close()
        self._sealer.shutdown()
        try:
            self.committer.close()
        finally:
            for writer in self._writers.values():
                writer.close()

    def _sync(self, shard: int) -> None:
        """Make durable what was written to a shard, and the masks beside it."""
        self._masks.sync()
        self._writers[shard].sync()

    def _writer(self, shard: int) -> ShardWriter:
        """The writer of a shard, opened at its first use."""
        with self._lock:
            if shard not in self._writers:
                layout = self._layout.shards[shard]
                writer = self._writers[shard] = ShardWriter(self._folder, layout)
                writer.hash_in_passing(sha256=self._sha256, held=self._held)
                logger.info(
                    "%s: %s bytes allocated for %d tensors", layout.file, f"{layout.size:,}", len(layout.tensors)
                )
                self._mark_done(shard, writer)
                self._unfinished.add(shard)
            return self._writers[shard]

    def _mark_done(self, shard: int, writer: ShardWriter) -> None:
        for tensor, written in self._progress.written.items():
            if self.shard_of(tensor) == shard:
                offset = self._places[self._plan.tensors[tensor].name].offset
                for start, stop in merged(written):
                    writer.mark(offset + start, offset + stop)

    def _catch_up(self, shard: int) -> None:
        """Have what is there of a shard hashed, if much is not."""
        with self._lock:
            if shard in self._followed or self._writers[shard].unhashed < BACKLOG_BYTES:
                return
            self._followed.add(shard)
        self._sealer.submit(self._follow, shard)

    def _follow(self, shard: int) -> None:
        """Hash what is there of a shard already; what fails here fails again when it is sealed."""
        with self._lock:
            self._followed.discard(shard)
        if not self._drivers.stopping:
            self._writer(shard).follow()

    def _seal(self, shard: int) -> None:
        self._sealed.append(self._sealer.submit(self._seal_now, shard))

    def _seal_now(self, number: int) -> SealedShard:
        try:
            self._drivers.check_stop()
            writer = self._writer(number)
            began = time.monotonic()
            self.committer.commit()
            sealed = writer.seal()
            self.committer.record(sealed_record(number, sealed))
            if len(self._layout.shards) > 1:
                writer.publish()
            seconds = time.monotonic() - began
            logger.info("%s: synced and checked in %.1f s, SHA-256 %s", sealed.file, seconds, sealed.sha256)
            self._announce(ShardSealed(sealed.file, sealed.size))
        except BaseException as error:
            self._drivers.fail(error)
            raise
        self._hand_over(number)
        return sealed

    def _hand_over(self, number: int) -> None:
        """Give a complete shard to the user's command; a failure ends the run."""
        try:
            if self._on_shard is not None and len(self._layout.shards) > 1:
                self._drivers.check_stop()
                hand_over(self._on_shard, self._folder / self._layout.shards[number].file)
                self.committer.record(handed_record(number))
                self.handed.add(number)
                logger.info("%s: handed over", self._layout.shards[number].file)
            self._unfinished.discard(number)
        except BaseException as error:
            self._drivers.fail(error)
            raise


class Sink:
    """Takes units of one tensor, has them written into its shard, and hands them to the committer."""

    def __init__(
        self,
        tensor: int,
        place: PlacedTensor,
        writer: Callable[[], ShardWriter],
        outgoing: Outgoing,
        committer: Committer,
        masks: TaskMasks,
        catch_up: Callable[[int], None],
    ) -> None:
        self._tensor = tensor
        self._place = place
        self._writer = writer
        self._outgoing = outgoing
        self._catch_up = catch_up
        self._committer = committer
        self._masks = masks

    def unit(self, offset: int, nbytes: int, written: Callable[[], None]) -> AbstractContextManager[U8]:
        """Memory for the bytes of the tensor from `offset` on, written by another thread once it is filled."""
        at = self._place.offset + offset

        def write(data: U8) -> None:
            crc = self._writer().write(at, data)
            self._committer.add(DoneUnit(self._tensor, self._place.shard, offset, offset + nbytes, crc))
            self._catch_up(self._place.shard)
            written()

        return self._outgoing.piece(self._tensor, nbytes, at % PAGE, write)

    def mask(self, model: int, start: int, bits: Array) -> None:
        """Keep a model's mask of the elements from `start` on."""
        self._masks.write(self._tensor, model, start, bits)
