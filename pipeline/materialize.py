"""One task's own model from a merge that keeps heads or masks beside it.

With `heads: separate` a merge keeps each model's head in `heads/NAME`, with `emr_unified` masks and rescalers in
`tasks/NAME`. Materialising a task streams the merged tensors, unmasked where there is a mask, and that head into a
folder of its own, with that model's configuration, which loads like any other checkpoint.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from mergepipe.errors import CheckpointNotFoundError
from mergepipe.pipeline import outputs
from mergepipe.pipeline.inputs import Inputs, Use
from mergepipe.pipeline.side_files import copy_side_files, look_at, to_json
from mergepipe.pipeline.space import Need, check_room
from mergepipe.pipeline.unmask import TaskMask
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.bits import MASKS_NAME
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry, open_checkpoint
from mergepipe.storage.layout import INDEX_NAME, OutputTensor, ShardLayout, lay_out
from mergepipe.storage.manifest import Segment
from mergepipe.storage.readers import MmapReader, Reader
from mergepipe.storage.writer import ShardWriter

COPY_BYTES = 8 * 1024 * 1024
UNMASK_ELEMENTS = 1024 * 1024

AGAIN = "remove what is in the output folder and give the command again"
MATERIALIZED = Use("the command began", AGAIN, AGAIN)


def materialize(
    merged: str | Path, *, task: str, out: str | Path | None = None, base: str | Path | None = None
) -> Path:
    """Write the checkpoint of one task.

    Parameters
    ----------
    merged : path
        Output folder of a finished merge with `heads: separate`, or by `emr_unified`.
    task : str
        Name of the model that is wanted: a folder in `heads` or `tasks`.
    out : path, optional
        The folder to write; must not exist, or be empty. By default it lies beside the merge, `merged-math` for the
        task `math` of `merged`.
    base : path, optional
        For masks: where the base of the merge is now, if not where it was.

    Returns
    -------
    Path
        The folder that was written, absolute.

    Raises
    ------
    CheckpointNotFoundError
        If the merge has no such head and no such masks; names those it has. Or if the base is gone.
    InputChangedError
        If the base of a merge with masks is no longer what it was, or a file changes while it is read.
    OutputExistsError
        If `out` holds something.
    """
    folder = Path(os.path.abspath(merged))
    head_folder = folder / outputs.HEADS_FOLDER / task
    has_masks = (folder / outputs.TASKS_FOLDER / task / MASKS_NAME).is_file()
    if task not in _tasks(folder) or not (head_folder.is_dir() or has_masks):
        listed = ", ".join(_tasks(folder)) or "none: it was merged neither with `heads: separate` nor by emr_unified"
        what = "masks for" if (folder / outputs.TASKS_FOLDER).is_dir() else "head"
        raise CheckpointNotFoundError(f"'{folder}' has no {what} '{task}'; it has {listed}")
    target = folder.with_name(f"{folder.name}-{task}") if out is None else Path(out).absolute()
    checkpoint = open_checkpoint(folder)
    head = open_checkpoint(head_folder) if head_folder.is_dir() else None
    mask = TaskMask(checkpoint, task, None if base is None else Path(base).absolute()) if has_masks else None
    beside = [*look_at(folder), *(look_at(head_folder) if head is not None else ())]
    read = [*checkpoint.files, *(head.files if head is not None else ()), *(mask.files if mask is not None else ())]
    inputs = Inputs([*read, *beside], use=MATERIALIZED)
    outputs.check_folder(target, [str(folder)])
    chosen = _choose(checkpoint, head)
    groups = _groups(checkpoint, chosen)
    layout = lay_out(groups, {"format": "pt"})
    check_room([Need(target, layout.nbytes, f"task '{task}'")])
    target.mkdir(parents=True, exist_ok=True)
    with MmapReader() as reader, inputs.unchanged():
        writers = [_write_shard(target, shard, chosen, mask, reader) for shard in layout.shards]
        copy_side_files(folder, target, {})
        if head is not None:
            copy_side_files(head_folder, target, {})
    for writer in writers:
        writer.publish()
    if layout.index is not None:
        write_atomic(target / INDEX_NAME, to_json(layout.index))
    return target


def _tasks(folder: Path) -> list[str]:
    beside = (folder / outputs.HEADS_FOLDER, folder / outputs.TASKS_FOLDER)
    return sorted({path.name for place in beside if place.is_dir() for path in place.iterdir() if path.is_dir()})


Chosen = dict[str, tuple[Checkpoint, TensorEntry]]


def _choose(checkpoint: Checkpoint, head: Checkpoint | None) -> Chosen:
    """The head's tensors in place of the merge's own head, everything else from the merge."""
    chosen: Chosen = {name: (checkpoint, entry) for name, entry in checkpoint.tensors.items()}
    return chosen if head is None else chosen | {name: (head, entry) for name, entry in head.tensors.items()}


def _groups(checkpoint: Checkpoint, chosen: Chosen) -> list[list[OutputTensor]]:
    """The merge's own division into files; head tensors it lacks join the last."""
    groups: list[list[OutputTensor]] = [[] for _ in checkpoint.files]
    for name, (_, entry) in chosen.items():
        own = checkpoint.tensors.get(name)
        groups[-1 if own is None else own.file].append(OutputTensor(name, entry.dtype, entry.shape))
    return [group for group in groups if group]


def _write_shard(
    target: Path, shard: ShardLayout, chosen: Chosen, mask: TaskMask | None, reader: Reader
) -> ShardWriter:
    writer = ShardWriter(target, shard)
    for place in shard.tensors:
        checkpoint, entry = chosen[place.name]
        if mask is not None and checkpoint is mask.merged and place.name in mask:
            itemsize = place.nbytes // max(1, math.prod(place.shape))
            for start in range(0, math.prod(place.shape), UNMASK_ELEMENTS):
                count = min(UNMASK_ELEMENTS, math.prod(place.shape) - start)
                writer.write(place.offset + start * itemsize, mask.values(place.name, start, count, reader))
            continue
        path = checkpoint.files[entry.file].path
        for start in range(0, entry.nbytes, COPY_BYTES):
            length = min(COPY_BYTES, entry.nbytes - start)
            with reader.window([Segment(path, entry.offset + start, length)], last=True) as window:
                writer.write(place.offset + start, window)
    writer.seal(sha256=False)
    return writer
