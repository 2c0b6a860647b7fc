"""What a journal says of earlier work on the same plan, and what is left to do.

Pure: it turns records into facts and facts into units. Reading the bytes back, and deciding whom to believe, is the
runner's part.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mergepipe.errors import WorkspaceError
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ScheduledTensor
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.journal import Record
from mergepipe.storage.writer import SealedShard
from mergepipe.tasks.blocks import block_bounds, block_count
from mergepipe.tasks.method import Shared, State, lasting

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Written:
    """Bytes `start` to `stop` of a tensor were durable, with this checksum."""

    start: int
    stop: int
    crc32c: int


@dataclass(slots=True)
class Progress:
    """What is done of a plan.

    Attributes
    ----------
    plan : str or None
        Id of the plan the journal belongs to; None for an empty journal.
    version : str or None
        Of the mergepipe that began it.
    device : str or None
        With which whole matrices are worked on; None if there are none.
    written : dict of int to list of Written
        By number of the tensor.
    states : dict of int to State
        What the reductions of a tensor found, by its number.
    sealed : dict of int to SealedShard
        By number of the shard.
    handed : set of int
        Numbers of the sealed shards that a command has taken over: they may be gone.
    rounds : dict of (int, int) to Shared
        What finished rounds found, by number of the group and of the round.
    changes, gaps, kept : dict of int to list of float
        What :mod:`mergepipe.pipeline.changes` and :mod:`mergepipe.pipeline.kept_norms` found of a tensor, by number.
    """

    plan: str | None = None
    version: str | None = None
    device: str | None = None
    written: dict[int, list[Written]] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    sealed: dict[int, SealedShard] = field(default_factory=dict)
    handed: set[int] = field(default_factory=set)
    rounds: dict[tuple[int, int], Shared] = field(default_factory=dict)
    changes: dict[int, list[float]] = field(default_factory=dict)
    gaps: dict[int, list[float]] = field(default_factory=dict)
    kept: dict[int, list[float]] = field(default_factory=dict)

    @staticmethod
    def replay(records: Iterable[Record]) -> Progress:
        """Read the records of a journal, in order.

        Raises
        ------
        WorkspaceError
            If a record is none that this version writes.
        """
        progress = Progress()
        for record in records:
            try:
                progress.add(record)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise WorkspaceError(
                    f"the journal holds a record that this version does not understand ({error!r}): finish the work "
                    f"with the version that began it, or drop it with `mergepipe run --restart`"
                ) from error
        return progress

    def add(self, record: Record) -> None:
        """Take one more record into account."""
        kind = record.get("type")
        if kind == "plan":
            self.plan, self.version = record["plan"], record["version"]
        elif kind == "device":
            self.device = record["device"]
        elif kind == "units":
            for tensor, start, stop, crc in record["units"]:
                self.written.setdefault(tensor, []).append(Written(start, stop, crc))
        elif kind == "state":
            self.states[record["tensor"]] = decode_state(record["state"])
        elif kind == "round":
            shared = Shared(decode_state(record["common"]), decode_state(record["each"]))
            self.rounds[record["group"], record["round"]] = shared
        elif kind == "sealed":
            shard = SealedShard(record["file"], record["size"], tuple(record["crc32c"]), record["sha256"])
            self.sealed[record["shard"]] = shard
        elif kind in ("change", "gaps", "kept"):
            found = {"change": self.changes, "gaps": self.gaps, "kept": self.kept}[kind]
            found[record["tensor"]] = [float(value) for value in record["found"]]
        elif kind == "handed":
            self.handed.add(record["shard"])
        elif kind == "forget":
            # Found damaged on an earlier resume: to be done again.
            for tensor in record["tensors"]:
                self.written.pop(tensor, None)
            for shard_number in record["shards"]:
                self.sealed.pop(shard_number, None)
                self.handed.discard(shard_number)

    def done_bytes(self, plan: Plan) -> int:
        """Output bytes that are done, those of sealed shards included."""
        sealed = {name for number in self.sealed for name in plan.groups[number]}
        total = 0
        for number, tensor in enumerate(plan.tensors):
            if tensor.name in sealed:
                total += tensor.output.nbytes
            else:
                total += sum(stop - start for start, stop in merged(self.written.get(number, ())))
        return total


def plan_record(plan: Plan) -> Record:
    """First record of a journal."""
    return {"type": "plan", "plan": plan.id, "version": plan.version}


def begin_record() -> Record:
    """Says that a process begins, or goes on; the records that follow are its."""
    return {"type": "begin", "at": round(time.time(), 3), "process": os.getpid()}


def state_record(tensor: int, state: State) -> Record:
    """The journal's record of what the reductions of a tensor found."""
    return {"type": "state", "tensor": tensor, "state": encode_state(state)}


def round_record(group: int, number: int, shared: Shared) -> Record:
    """The journal's record of what a round found about the whole model."""
    common, each = encode_state(shared.common), encode_state(shared.each)
    return {"type": "round", "group": group, "round": number, "common": common, "each": each}


def sealed_record(number: int, shard: SealedShard) -> Record:
    """The journal's record of a complete shard."""
    return {
        "type": "sealed",
        "shard": number,
        "file": shard.file,
        "size": shard.size,
        "crc32c": list(shard.crc32c),
        "sha256": shard.sha256,
    }


def encode_state(state: State) -> dict[str, Any]:
    """A state as JSON values, bit for bit; without what only passes through it.

    Examples
    --------
    >>> state = {"thresholds": np.array([0.1], np.float32)}
    >>> decode_state(encode_state(state))["thresholds"].tobytes() == state["thresholds"].tobytes()
    True
    """
    return {
        name: [value.dtype.str, list(value.shape), base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()]
        for name, value in lasting(state).items()
    }


def decode_state(record: dict[str, Any]) -> State:
    """The reverse of :func:`encode_state`."""
    return {
        name: np.frombuffer(base64.b64decode(data), dtype).reshape(shape).copy()
        for name, (dtype, shape, data) in record.items()
    }


def merged(written: Iterable[Written]) -> list[Interval]:
    """Disjoint, sorted intervals that cover the same bytes.

    Examples
    --------
    >>> merged([Written(4, 8, 0), Written(0, 4, 0), Written(12, 16, 0), Written(6, 8, 0)])
    [(0, 8), (12, 16)]
    """
    found: list[Interval] = []
    for start, stop in sorted((item.start, item.stop) for item in written):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


def gaps(length: int, done: Sequence[Interval]) -> list[Interval]:
    """What `done` leaves of 0 to `length`.

    Examples
    --------
    >>> gaps(20, [(0, 8), (12, 16)])
    [(8, 12), (16, 20)]
    """
    found = []
    at = 0
    for start, stop in done:
        if min(start, length) > at:
            found.append((at, min(start, length)))
        at = max(at, stop)
    if at < length:
        found.append((at, length))
    return found


def remaining(item: ScheduledTensor, written: Iterable[Written]) -> ScheduledTensor:
    """The tensor with only those units left that are not done.

    Work was done in whole blocks (or, for a copied tensor, whole elements), perhaps cut into other units than now.
    """
    done = merged(written)
    if not done:
        return item
    tensor = item.tensor
    if tensor.action == "copy":
        itemsize = DTYPES[tensor.dtype].itemsize
        covered = [(start // itemsize, stop // itemsize) for start, stop in done]
    else:
        covered = [_blocks(tensor.shape, DTYPES[tensor.dtype].itemsize, interval) for interval in done]
    last = item.units[-1][1] if item.units else 0
    step = max((stop - start for start, stop in item.units), default=1)
    units = tuple(
        (first, min(first + step, stop)) for start, stop in gaps(last, covered) for first in range(start, stop, step)
    )
    return replace(item, units=units)


def _blocks(shape: tuple[int, ...], itemsize: int, interval: Interval) -> Interval:
    """The blocks that an interval of bytes covers; it starts and ends on block bounds."""
    return _block_at(shape, interval[0] // itemsize), _block_at(shape, interval[1] // itemsize)


def _block_at(shape: tuple[int, ...], element: int) -> int:
    """Number of the block that starts at `element`; the count of blocks at the end."""
    low, high = 0, block_count(shape)
    while low < high:
        middle = (low + high) // 2
        if block_bounds(shape, middle)[0] < element:
            low = middle + 1
        else:
            high = middle
    return low
