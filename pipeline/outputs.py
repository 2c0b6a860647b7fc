"""The output folder: what lies beside the weights, and in which order it appears.

Weights are `.part` files until they are complete. Configuration, tokenizer, model card and manifest come next, and the
last thing of all is the index, or the name of the single weights file: what has that is a whole model.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

from mergepipe.errors import OutputExistsError
from mergepipe.pipeline import side_files
from mergepipe.pipeline.card import model_card, reconstructions
from mergepipe.pipeline.inputs import Inputs
from mergepipe.pipeline.measure import Meter
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.records import MANIFEST_NAME, read_record
from mergepipe.pipeline.side_files import to_json
from mergepipe.storage import ballast
from mergepipe.storage.atomic import temporary_of, write_atomic
from mergepipe.storage.digest import GRAIN_BYTES
from mergepipe.storage.layout import INDEX_NAME
from mergepipe.storage.writer import SealedShard, publish_part

HEADS_FOLDER = "heads"
TASKS_FOLDER = "tasks"
CARRIED_FOLDER = "opcm"
CARD_NAME = "README.md"


def check_folder(folder: Path, inputs: Iterable[str], ours: Iterable[str] = ()) -> None:
    """Refuse an output folder that is an input, lies inside one, or holds something that is not ours.

    Parameters
    ----------
    folder : Path
        Absolute.
    inputs : iterable of str
        Absolute paths of all models read.
    ours : iterable of str
        Names that may be there already: unfinished work of the same plan.

    Raises
    ------
    OutputExistsError
    """
    target = folder.resolve()
    for path in inputs:
        model = Path(path).resolve()
        if target == model or model in target.parents:
            raise OutputExistsError(
                f"the output '{folder}' lies in the model '{path}': choose another folder with --out"
            )
        if target in model.parents:
            raise OutputExistsError(
                f"the model '{path}' lies in the output '{folder}': choose another folder with --out"
            )
    if folder.is_dir():
        known = set(ours)
        names = [entry.name for entry in folder.iterdir()]
        strangers = sorted(name for name in names if not {name, temporary_of(name)} & known)
        if strangers:
            shown = ", ".join([*strangers[:3], *(["…"] if len(strangers) > 3 else [])])
            raise OutputExistsError(
                f"the output '{folder}' is not empty ({shown}): remove it, or choose another with --out"
            )
    else:
        there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        if not there.is_dir():
            what = "is" if there == folder else f"lies in '{there}', which is"
            raise OutputExistsError(f"the output '{folder}' {what} a file: choose another folder with --out")


def work_names(plan: Plan) -> set[str]:
    """Names that an unfinished run of this plan may have left in the output folder; a kill may come at the very end."""
    shards = {f"{shard.file}{end}" for shard in plan.layout().shards for end in ("", ".part")}
    beside = _copied_names(plan)
    beside |= first_names(plan) | set(plan.beside.files)
    return shards | beside | {HEADS_FOLDER, TASKS_FOLDER, CARD_NAME, MANIFEST_NAME, INDEX_NAME}


def _copied_names(plan: Plan) -> set[str]:
    """Names in the output of what is copied from a model; an earlier merge shows them when it is made."""
    if plan.sidecar is None:
        return set()
    source = Path(plan.models[plan.sidecar].path)
    files = plan.side_files if plan.side_files is not None else side_files.look_at(source)
    return side_files.top_names(files, source)


def first_names(plan: Plan) -> set[str]:
    """Names that are in the output folder before this plan begins to work there."""
    return set() if plan.first_stage is None else {CARRIED_FOLDER}


def sweep(plan: Plan) -> None:
    """Remove temporary files that a killed run has left in the output folder; for the holder of the lock."""
    folder = Path(plan.output)
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if temporary_of(path.name) in work_names(plan):
            path.unlink(missing_ok=True)


def held_bytes(plan: Plan) -> int:
    """Bytes of disk that the unfinished files of this plan hold already."""
    total = sum(ballast.held_bytes(Path(plan.output) / name) for name in (HEADS_FOLDER, TASKS_FOLDER))
    for shard in plan.layout().shards:
        for end in ("", ".part"):
            with contextlib.suppress(OSError):
                total += (Path(plan.output) / f"{shard.file}{end}").stat().st_blocks * 512
    return total


def remove_work(plan: Plan) -> None:
    """Remove what an unfinished run of this plan may have left in the output folder."""
    if finished(plan) is not None:
        raise OutputExistsError(f"the output '{plan.output}' is a finished model: remove it to make it again")
    sweep(plan)
    for name in sorted(work_names(plan)):
        path = Path(plan.output) / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def config_changes(plan: Plan) -> dict[str, Any]:
    """What a merge writes into the configuration that it copies."""
    return plan.config | ({"torch_dtype": plan.dtype} if plan.dtype else {})


def manifest(
    plan: Plan,
    sealed: Sequence[SealedShard],
    findings: Mapping[str, dict[str, Any]],
    meter: Meter,
    workers: int,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """The record of what was merged into what, by what, and what it took.

    `findings` are the records of :mod:`mergepipe.pipeline.diagnostics`, by name of the tensor.
    """
    with_torch = device != "cpu" or any("route" in found for found in findings.values())
    return {
        "mergepipe": plan.version,
        "plan": plan.id,
        "method": plan.recipe["merge_method"],
        "reconstructions": {
            name: {"specification": used.specification, "known": list(used.known), "chosen": list(used.chosen)}
            for name, used in reconstructions(plan).items()
        },
        "recipe": plan.recipe,
        "inputs": [
            {"model": model.public, "path": model.path, "role": model.role, "fingerprint": model.fingerprint}
            | ({"adapter": model.adapter} if model.adapter else {})
            for model in (*plan.models[:1], *plan.merged_before, *plan.models[1:])
            if model.role != "carried"
        ],
        "side_files": _all_side_files(plan),
        "shards": [
            {
                "file": shard.file,
                "bytes": shard.size,
                "sha256": shard.sha256,
                "crc32c": list(shard.crc32c),
                "crc32c_bytes": GRAIN_BYTES,
            }
            for shard in sealed
        ],
        "densities": {name: found["densities"] for name, found in sorted(findings.items()) if "densities" in found},
        "tensors": dict(sorted(findings.items())),
        "device": device,
        "workers": workers,
        "versions": {name: version(name) for name in ("numpy", "numba", "zarr", "dask", "safetensors")}
        | ({"torch": version("torch")} if with_torch else {})
        | {"python": platform.python_version()},
        "seconds": round(meter.seconds, 3),
        "disk_bytes_read": meter.disk_read,
        "disk_bytes_written": meter.disk_written,
        "peak_anonymous_bytes": meter.peak_anonymous,
    }


def check_side_files(plan: Plan) -> list[Inputs]:
    """Refuse to go on if a file that is copied beside the weights, or a head, is not the one the plan was made for.

    Returns
    -------
    list of Inputs
        Which tell later whether they stayed so.

    Raises
    ------
    InputChangedError
    """
    found = []
    if plan.sidecar is not None and plan.side_files is not None:
        source = Path(plan.models[plan.sidecar].path)
        found.append(side_files.check_unchanged(plan.side_files, source, plan.beside.withheld))
    for label, files in plan.head_files.items():
        source = Path(plan.models[plan.side[label][0].model].path)
        found.append(side_files.check_unchanged(files, source))
    return found


def _all_side_files(plan: Plan) -> str:
    """What says whether the copied files of another plan are the same."""
    return side_files.fingerprint([*(plan.side_files or ()), *chain.from_iterable(plan.head_files.values())])


def put_beside(plan: Plan, source: Path, folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put configuration and tokenizer files into a folder.

    Parameters
    ----------
    plan : Plan
    source : Path
        Where the files of the model `plan.sidecar` are.
    folder : Path
        Must exist.
    contents : mapping of str to bytes
        Of the files that `plan.beside` names.
    """
    drops = () if plan.sidecar is None else plan.models[plan.sidecar].drops
    side_files.copy_side_files(source, folder, config_changes(plan), plan.beside.withheld, drops)
    for name in plan.beside.files:
        write_atomic(folder / name, contents[name])


def put_side_files(plan: Plan, beside: Path, before: Sequence[Inputs]) -> None:
    """Put configuration and tokenizer files beside the weights.

    Parameters
    ----------
    plan : Plan
    beside : Path
        Folder of the files that `plan.beside` names.
    before : sequence of Inputs
        From :func:`check_side_files`, before work began: heads have been put beside the weights since.

    Raises
    ------
    InputChangedError
        If one that is copied is not the one the plan was made for.
    """
    if plan.sidecar is not None:
        contents = {name: (beside / name).read_bytes() for name in plan.beside.files}
        check_side_files(plan)
        put_beside(plan, Path(plan.models[plan.sidecar].path), Path(plan.output), contents)
        check_side_files(plan)  # what was copied is what the plan means
        for inputs in before:
            inputs.check()


def with_effort(record: dict[str, Any], meter: Meter) -> dict[str, Any]:
    """The manifest with what came after the weights: seconds and bytes added, the larger peak of memory."""
    return record | {
        "seconds": round(record["seconds"] + meter.seconds, 3),
        "disk_bytes_read": record["disk_bytes_read"] + meter.disk_read,
        "disk_bytes_written": record["disk_bytes_written"] + meter.disk_written,
        "peak_anonymous_bytes": max(record["peak_anonymous_bytes"], meter.peak_anonymous),
    }


def publish(plan: Plan, record: Mapping[str, Any]) -> None:
    """Put card and manifest beside the weights and what belongs to them, and the index (or the one file's name) last.

    Parameters
    ----------
    plan : Plan
    record : mapping
        The manifest.
    """
    folder = Path(plan.output)
    write_atomic(folder / CARD_NAME, model_card(plan).encode())
    replace_manifest(plan, record)
    index = plan.layout().index
    if index is None:
        publish_part(folder / f"{plan.stem}.safetensors")
    else:
        write_atomic(folder / INDEX_NAME, to_json(index))


def replace_manifest(plan: Plan, record: Mapping[str, Any]) -> None:
    """Write the manifest of a finished output anew, whole or not at all."""
    write_atomic(Path(plan.output) / MANIFEST_NAME, to_json(record))


def withdraw_index(plan: Plan) -> None:
    """Some of the output's files are made again: it is no whole model until then."""
    (Path(plan.output) / INDEX_NAME).unlink(missing_ok=True)


def finished(plan: Plan) -> dict[str, Any] | None:
    """The manifest of the plan's output if that is complete and of this very plan, else None."""
    folder = Path(plan.output)
    last = folder / (INDEX_NAME if len(plan.groups) > 1 else f"{plan.stem}.safetensors")
    try:
        record = read_record(folder)
    except ValueError:
        return None
    beside = _all_side_files(plan)
    same = record["plan"] == plan.id and record.get("side_files", beside) == beside
    return record if same and last.exists() else None
