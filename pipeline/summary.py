"""A plan in numbers and in a table: what `build` and `plan` show, as plain values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.memory import Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.schedule import ScheduledTensor, ceiling_of, disk_bytes_read, pool_bytes, schedule
from mergepipe.pipeline.space import disk_bytes


def scheduled(plan: Plan, workers: int | None = None) -> tuple[ScheduledTensor, ...]:
    """The plan cut into units as a run with the plan's own ceiling would cut it; a first stage comes first."""
    return tuple(item for stage in _stages(plan, workers) for item in stage)


def _stages(plan: Plan, workers: int | None = None) -> list[tuple[ScheduledTensor, ...]]:
    ceiling = ceiling_of(plan, None, workers)
    return [
        schedule(stage, ceiling, gathered=[model.store == "copy" for model in stage.models]) for stage in plan.stages
    ]


def _past_the_page_cache(stage: Plan, ceiling: Ceiling, mapped: Sequence[ScheduledTensor]) -> tuple[int, int]:
    """Memory at the peak, and bytes read, of a run that reads past the page cache, or as it can if that does not fit.

    What the units leave of the ceiling buffers reads; tensors that fit there are read from the disk once.
    """
    items, pool = mapped, 0
    with suppress(MemoryBudgetError):
        items = schedule(stage, ceiling, gathered=[True] * len(stage.models))
        pool = pool_bytes(items)
    needed = max((item.projected for item in items), default=0)
    return min(ceiling.allowed, needed + pool), sum(disk_bytes_read(item, pool) for item in items)


def summarize(plan: Plan) -> dict[str, Any]:
    """The plan in a few numbers; all sizes in bytes.

    Returns
    -------
    dict
        `id`, `output`, `models` (label, role, store, why, nbytes, copied_bytes), `tensors`, `merged`, `copied`,
        `parameters`, `methods` (tensors per method), `input_bytes` (one read of everything that is used), `sweeps`
        (reads of the tensor that is read most often), `requested_bytes` (asked for in all sweeps), `read_bytes` (of
        them from the disk, if read past the page cache, where what fits the ceiling is kept), `output_bytes`,
        `first_stage_bytes` (kept beside it for models to come), `shards`, `units`, `tasks`, `needed_bytes` (of memory,
        by the program and its units), `projected_bytes` (with the buffers of such reads, at the peak), `allowed_bytes`,
        `disk_bytes` (output, heads and masks beside it, copies, journal and statistics), `notes`.
    """
    layout = plan.layout()
    stages = _stages(plan)
    items, own = tuple(item for stage in stages for item in stage), stages[-1]
    ceiling = ceiling_of(plan, None, None)
    pairs = zip(plan.stages, stages, strict=True)
    peaks, reads = zip(*(_past_the_page_cache(stage, ceiling, mapped) for stage, mapped in pairs), strict=True)
    first = 0 if plan.first_stage is None else plan.first_stage.layout().nbytes
    methods = Counter(
        tensor.method + (f" + {tensor.sparsify}" if tensor.sparsify != "none" else "")
        for tensor in plan.tensors
        if tensor.action == "merge"
    )
    return {
        "id": plan.id,
        "output": plan.output,
        "models": [
            {key: value for key, value in asdict(model).items() if key != "fingerprint"} for model in plan.models
        ],
        "tensors": len(plan.tensors),
        "merged": sum(tensor.action == "merge" for tensor in plan.tensors),
        "copied": sum(tensor.action == "copy" for tensor in plan.tensors),
        "side": {label: [source.name for source in sources] for label, sources in plan.side.items()},
        "parameters": sum(_size(item) for item in own),
        "methods": dict(methods.most_common()),
        "input_bytes": sum(item.tensor.input_bytes() for item in items),
        "sweeps": max((math.ceil(len(item.rounds) + item.sweep_reads + 1) for item in items), default=0),
        "requested_bytes": sum(item.bytes_read for item in items),
        "read_bytes": sum(reads),
        "output_bytes": layout.nbytes,
        "first_stage_bytes": first,
        "shards": len(layout.shards),
        "units": sum(len(item.units) for item in items),
        "tasks": sum(item.tasks for item in items),
        "needed_bytes": max((item.projected for item in items), default=0),
        "projected_bytes": max(peaks),
        "allowed_bytes": plan.allowed,
        "disk_bytes": disk_bytes(plan, stages),
        "notes": list(plan.notes),
    }


def tensor_rows(plan: Plan) -> list[dict[str, Any]]:
    """One record per tensor and stage: method, sweeps, units, bytes, memory."""
    return [
        {
            "stage": number,
            "name": item.tensor.name,
            "shape": list(item.tensor.shape),
            "dtype": item.tensor.dtype,
            "action": item.tensor.action,
            "method": item.tensor.method or None,
            "sparsify": item.tensor.sparsify,
            "rounds": list(item.rounds),
            "sweeps": list(item.sweeps),
            "units": len(item.units),
            "bytes_read": item.bytes_read,
            "bytes_written": item.tensor.output.nbytes,
            "projected_bytes": item.projected,
            "shard": places[item.tensor.name].shard,
            "offset": places[item.tensor.name].offset,
        }
        for number, (stage, items) in enumerate(zip(plan.stages, _stages(plan), strict=True), 1)
        for places in [stage.layout().places]
        for item in items
    ]


def _size(item: ScheduledTensor) -> int:
    return math.prod(item.tensor.shape)
