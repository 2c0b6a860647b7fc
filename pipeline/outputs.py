"""The output folder: what lies beside the weights, and in which order it appears.

Weights are `.part` files until they are complete. Configuration, tokenizer, model card and manifest come next, and the
last thing of all is the index, or the name of the single weights file: what has that is a whole model.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mergepipe.errors import OutputExistsError
from mergepipe.pipeline.card import model_card, reconstructions
from mergepipe.pipeline.measure import Meter
from mergepipe.pipeline.plan import Plan
from mergepipe.pipeline.records import MANIFEST_NAME, read_record
from mergepipe.storage import copied
from mergepipe.storage.atomic import temporary_of, write_atomic
from mergepipe.storage.digest import GRAIN_BYTES
from mergepipe.storage.layout import INDEX_NAME
from mergepipe.storage.writer import SealedShard, publish_part

HEADS_FOLDER = "heads"
TASKS_FOLDER = "tasks"
CARRIED_FOLDER = "opcm"
CARD_NAME = "README.md"

SIDECARS = (
    "config.json",
    "adapter_config.json",
    "generation_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "*preprocessor_config.json",
    "processor_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)
"""Files that make a folder of weights a model: copied from the base."""

SIDECAR_FOLDERS = ("additional_chat_templates",)
"""Folders that belong to them."""


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
    beside = set() if plan.sidecar is None else {p.name for p in _sidecars(Path(plan.models[plan.sidecar].path))}
    beside |= first_names(plan) | set(plan.beside.files)
    return shards | beside | {HEADS_FOLDER, TASKS_FOLDER, CARD_NAME, MANIFEST_NAME, INDEX_NAME}


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
    total = sum(copied.held_bytes(Path(plan.output) / name) for name in (HEADS_FOLDER, TASKS_FOLDER))
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


def _sidecars(source: Path, withheld: Iterable[str] = ()) -> list[Path]:
    """Files and folders of a model that are copied beside the weights; without those of some patterns."""
    found = [path for pattern in SIDECARS for path in sorted(source.glob(pattern)) if path.is_file()]
    folders = [source / name for name in SIDECAR_FOLDERS if (source / name).is_dir()]
    found, folders = (
        [path for path in paths if not any(path.match(pattern) for pattern in withheld)] for paths in (found, folders)
    )
    return [path for path in found if not path.name.endswith((".safetensors", ".bin", ".part"))] + folders


def copy_sidecars(
    source: Path, target: Path, changes: Mapping[str, Any], withheld: Iterable[str] = (), drops: Iterable[str] = ()
) -> None:
    """Copy configuration and tokenizer files.

    `changes`, as deep as it is, replace values of `config.json`, whose keys `drops` are left out. Files that match a
    pattern of `withheld` are not copied.
    """
    for path in _sidecars(source, tuple(withheld)):
        if path.is_dir():
            _copy_folder(path, target / path.name)
            continue
        data = path.read_bytes()
        if path.name == "config.json" and (changes or drops):
            data = _changed(data, changes, drops)
        write_atomic(target / path.name, data)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy the regular files of a folder, not their modes: the copy may be from a read-only place."""
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        if path.is_file():
            write_atomic(target / path.name, path.read_bytes())


def _changed(config: bytes, changes: Mapping[str, Any], drops: Iterable[str]) -> bytes:
    """A configuration with other values; byte for byte as it was if it has these already."""
    before = json.loads(config)
    values = {key: copy.deepcopy(value) for key, value in before.items() if key not in drops}
    put_values(values, changes)
    return config if values == before else to_json(values)


def config_changes(plan: Plan) -> dict[str, Any]:
    """What a merge writes into the configuration that it copies."""
    return plan.config | ({"torch_dtype": plan.dtype} if plan.dtype else {})


def put_values(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Put changes, as deep as they are, into a configuration."""
    for key, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(key), dict):
            put_values(values[key], value)
        else:
            # A type is written under the name that the configuration uses for it already, and where it repeats it.
            if key == "torch_dtype":
                key = "dtype" if "dtype" in values else key
                _put_inner_types(values, values.get(key), value)
            values[key] = value


def _put_inner_types(values: dict[str, Any], old: object, new: object) -> None:
    """Models of several parts say the type of each; a part that had the whole's type follows it."""
    for inner in values.values():
        if isinstance(inner, dict):
            for key in ("dtype", "torch_dtype"):
                if key in inner and inner[key] == old:
                    inner[key] = new
            _put_inner_types(inner, old, new)


def to_json(values: Mapping[str, Any]) -> bytes:
    """As configuration files are written: two spaces deep, a newline at the end."""
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


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
    copy_sidecars(source, folder, config_changes(plan), plan.beside.withheld, drops)
    for name in plan.beside.files:
        write_atomic(folder / name, contents[name])


def publish(plan: Plan, record: Mapping[str, Any], beside: Path) -> None:
    """Put everything beside the weights, and the index (or the single file's name) last.

    Parameters
    ----------
    plan : Plan
    record : mapping
        The manifest.
    beside : Path
        Folder of the files that `plan.beside` names.
    """
    folder = Path(plan.output)
    if plan.sidecar is not None:
        contents = {name: (beside / name).read_bytes() for name in plan.beside.files}
        put_beside(plan, Path(plan.models[plan.sidecar].path), folder, contents)
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


def finished(plan: Plan) -> dict[str, Any] | None:
    """The manifest of the plan's output if that is complete and of this very plan, else None."""
    folder = Path(plan.output)
    last = folder / (INDEX_NAME if len(plan.groups) > 1 else f"{plan.stem}.safetensors")
    try:
        record = read_record(folder)
    except ValueError:
        return None
    return record if record["plan"] == plan.id and last.exists() else None
