"""Masks and rescalers that a merge keeps for each task: `tasks/NAME/masks.safetensors` in the output.

They are written beside the output, piece by piece as the kernel comes along. A unit of the output is recorded as done
only once its pieces are durable as well, so a resume finds both or redoes both. The files get their names when all
tensors are made, before the output gets its own. What lets a task's model be put together again stands in the file's
metadata: the rescaler of each tensor, which model the base was, and what it calls its tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mergepipe.errors import Fault, RecipeError, WorkspaceError
from mergepipe.pipeline.outputs import TASKS_FOLDER
from mergepipe.pipeline.plan import Plan, Source
from mergepipe.storage.bits import MaskWriter, mask_layout, masks_exist, reserve_masks
from mergepipe.storage.dtypes import DTYPES
from mergepipe.tasks.method import Array, State
from mergepipe.tasks.registry import METHODS

RESCALERS = "mergepipe.rescalers"
"""Key in a mask file's metadata: JSON, factor by name of the tensor."""

BASE = "mergepipe.base"
"""Key in a mask file's metadata: JSON with the `model` that the base is, as the manifest calls it, and `names`: what it
calls a tensor, where that is another name than the output's."""

BASE_ROWS = "base.safetensors"
"""Beside the folders of the tasks: the base's tensors that no file of its own has as they were merged."""

PAGE_BYTES = 4096
"""What a mask file's header is filled up to a multiple of."""

TENSOR_BYTES = 768
"""What it says of one tensor, names and rescaler, at the most."""


def masked_tensors(plan: Plan) -> dict[int, dict[int, int]]:
    """For each model that has masks, numbers of the tensors that it is in, and its place among their models."""
    found: dict[int, dict[int, int]] = {}
    for number, tensor in enumerate(plan.tensors):
        if tensor.action == "merge" and METHODS[tensor.method].masks is not None:
            for position, source in enumerate(tensor.models):
                found.setdefault(source.model, {})[number] = position
    return found


def mask_bytes(plan: Plan) -> dict[int, int]:
    """Bytes of the file with masks of each model that has one, at the most."""
    return {
        model: PAGE_BYTES + sum(math.prod(plan.tensors[number].shape) // 8 + TENSOR_BYTES for number in members)
        for model, members in masked_tensors(plan).items()
    }


def kept_base(plan: Plan) -> dict[str, Source]:
    """Tensors of the base, by their names in the output, that are kept beside the masks: no file has their rows.

    A task's model is put together from the base as it was merged. Where the base was read with the rows of another
    vocabulary, its own file would not do.
    """
    masked = [t for t in plan.tensors if t.action == "merge" and METHODS[t.method].masks is not None]
    return {t.name: t.base for t in masked if t.base is not None and plan.is_gathered(t.base)}


def kept_base_bytes(plan: Plan) -> int:
    """Bytes of the file with these, at the most; 0 where there is none."""
    kept = kept_base(plan)
    sizes = [math.prod(tensor.shape) for tensor in plan.tensors if tensor.name in kept]
    items = [DTYPES[kept[tensor.name].dtype].itemsize for tensor in plan.tensors if tensor.name in kept]
    values = sum(size * itemsize for size, itemsize in zip(sizes, items, strict=True))
    return values + PAGE_BYTES * (1 + len(kept)) if kept else 0


def check_masks(plan: Plan) -> None:
    """Refuse masks over several bases: a task's model is put together from one.

    Raises
    ------
    RecipeError
    """
    members = {number for tensors in masked_tensors(plan).values() for number in tensors}
    bases = {base.model for number in members if (base := plan.tensors[number].base) is not None}
    if len(bases) > 1:
        named = " and ".join(f"'{plan.models[number].label}'" for number in sorted(bases))
        what = f"the masks of a task would be over several bases, {named}"
        raise RecipeError([Fault("$", f"{what}: name one `base_model` for all parts, or merge them one by one")])


class TaskMasks:
    """The mask files of a run; of no consequence where no method has any.

    Parameters
    ----------
    plan : Plan
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._members = masked_tensors(plan)
        self._writers: dict[int, MaskWriter] = {}

    def reserve(self, *, begun: bool) -> None:
        """Set disk space aside for all files, before rounds find out what goes into them.

        Parameters
        ----------
        begun : bool
            Whether some of the output is there already; the files are, too, then.

        Raises
        ------
        DiskFullError
        """
        for model, nbytes in () if begun else mask_bytes(self._plan).items():
            reserve_masks(self._folder(model), nbytes)

    def _folder(self, model: int) -> Path:
        return Path(self._plan.output) / TASKS_FOLDER / self._plan.models[model].label

    def open(self, state_of: Callable[[int], State], *, begun: bool) -> None:
        """Open all files, once the rescalers are known.

        Parameters
        ----------
        state_of : callable
            What rounds have left for a tensor, by its number.
        begun : bool
            Whether some of the output is there already.

        Raises
        ------
        WorkspaceError
            If it is, but a file with masks is gone.
        """
        for model, members in self._members.items():
            folder = self._folder(model)
            if begun and not masks_exist(folder):
                raise WorkspaceError(
                    f"the masks in '{folder}' are gone, while the merge they belong to is unfinished: start again with "
                    f"`mergepipe run --restart`"
                )
            self._writers[model] = MaskWriter(
                folder, mask_layout(self._sizes(members), self._metadata(members, state_of))
            )

    def _sizes(self, members: Mapping[int, int]) -> dict[str, int]:
        tensors = [self._plan.tensors[number] for number in members]
        return {tensor.name: int(np.prod(tensor.shape, dtype=np.int64)) for tensor in tensors}

    def _metadata(self, members: Mapping[int, int], state_of: Callable[[int], State]) -> dict[str, str]:
        factors = {self._plan.tensors[n].name: float(state_of(n)["rescalers"][k]) for n, k in members.items()}
        tensors = [self._plan.tensors[number] for number in members]
        bases = {tensor.name: tensor.base for tensor in tensors if tensor.base is not None}
        called = next((self._plan.models[base.model].public for base in bases.values()), "")
        names = {name: base.name for name, base in bases.items() if base.name != name}
        below = json.dumps({"model": called, "names": names})
        return {"format": "mergepipe masks 1", RESCALERS: json.dumps(factors), BASE: below}

    def write(self, tensor: int, position: int, start: int, bits: Array) -> None:
        """Set bits of a tensor's elements from `start` on, for the model at `position`."""
        planned = self._plan.tensors[tensor]
        self._writers[planned.models[position].model].write(planned.name, start, bits)

    def sync(self) -> None:
        """Make everything written so far durable."""
        for writer in self._writers.values():
            writer.sync()

    def finish(self) -> None:
        """Check all files and give them their names."""
        for writer in self._writers.values():
            writer.finish()

    def close(self) -> None:
        """Give their file descriptors back."""
        for writer in self._writers.values():
            writer.close()
