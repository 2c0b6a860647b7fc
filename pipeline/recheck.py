"""Reading back what a journal promises, before a resumed run believes it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.resume import Progress, Written
from mergepipe.storage.journal import Record
from mergepipe.storage.layout import OutputLayout, ShardLayout
from mergepipe.storage.writer import crc32c_of_range, matches

SAMPLED_UNITS = 32
"""Units per shard that `--verify sample` reads back, spread evenly, the last ones among them."""


@dataclass(slots=True)
class Damage:
    """What must be done again: tensors and shards by number, and what to tell the user."""

    tensors: set[int] = field(default_factory=set)
    shards: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.shards)

    def record(self) -> Record:
        """The journal's record that this work is to be forgotten."""
        return {"type": "forget", "tensors": sorted(self.tensors), "shards": sorted(self.shards)}


def check(
    progress: Progress,
    plan: Plan,
    layout: OutputLayout,
    folder: Path,
    mode: Literal["none", "sample", "full"],
    check_stop: Callable[[], None] = lambda: None,
) -> Damage:
    """Compare what lies on disk with what the journal says.

    That a file is there with the right size is always checked; contents as far as `mode` asks.

    Parameters
    ----------
    progress : Progress
    plan : Plan
    layout : OutputLayout
    folder : Path
        The output folder.
    mode : {'none', 'sample', 'full'}
    check_stop : callable
        Called before each file and each unit that is looked at; may raise, as this changes nothing.

    Returns
    -------
    Damage
        Empty if all is well.
    """
    damage = Damage()
    numbers = {tensor.name: number for number, tensor in enumerate(plan.tensors)}
    for number, shard in enumerate(layout.shards):
        check_stop()
        members = [numbers[tensor.name] for tensor in shard.tensors]
        if number in progress.handed:
            continue
        if number in progress.sealed:
            if not _sealed_intact(progress, number, shard, folder, mode):
                damage.shards.add(number)
                damage.tensors.update(members)
                damage.notes.append(f"'{shard.file}' is missing or damaged: it has to be made again")
            continue
        written = [member for member in members if progress.written.get(member)]
        part = folder / f"{shard.file}.part"
        if written and not (part.is_file() and part.stat().st_size == shard.size):
            damage.tensors.update(written)
            damage.notes.append(f"'{part.name}' is gone: its {len(written)} tensors have to be made again")
            continue
        for member in _damaged_tensors(progress, written, shard, plan, part, mode, check_stop):
            damage.tensors.add(member)
            damage.notes.append(f"'{plan.tensors[member].name}' in '{part.name}' is damaged: it has to be made again")
    return damage


def _sealed_intact(progress: Progress, number: int, shard: ShardLayout, folder: Path, mode: str) -> bool:
    """Whether a complete shard is there: still as `.part`, which is the newer one if both are there, or renamed.

    It may go while it is looked at: a killed run leaves behind the command that takes its shard over.
    """
    for path in (folder / f"{shard.file}.part", folder / shard.file):
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_size == shard.size and (
                mode == "none" or matches(path, progress.sealed[number], mode)
            )
    return False


def _damaged_tensors(
    progress: Progress,
    members: list[int],
    shard: ShardLayout,
    plan: Plan,
    part: Path,
    mode: str,
    check_stop: Callable[[], None],
) -> list[int]:
    if mode == "none":
        return []
    places = {tensor.name: tensor.offset for tensor in shard.tensors}
    units = [(member, unit) for member in members for unit in progress.written[member]]
    bad = []
    for member, unit in units if mode == "full" else _sample(units):
        check_stop()
        start = places[plan.tensors[member].name] + unit.start
        if member not in bad and crc32c_of_range(part, start, unit.stop - unit.start) != unit.crc32c:
            bad.append(member)
    return bad


def _sample(units: list[tuple[int, Written]]) -> list[tuple[int, Written]]:
    """Some units, spread evenly over the order of their writing, the newest first among them."""
    step = max(1, len(units) // SAMPLED_UNITS)
    return units[::-step]
