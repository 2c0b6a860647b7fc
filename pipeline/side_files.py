"""The files that make a folder of weights a model: configuration, tokenizer, chat templates.

They are copied from one model of a merge, the base as a rule. Like its weights they are inputs: a plan keeps what says
whether they are still the same (size, time and inode), and a run that finds another file, or none, ends there.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.inputs import BESIDE, Inputs
from mergepipe.storage.atomic import copy_atomic, write_atomic
from mergepipe.storage.checkpoint import CONFIG, FileInfo, file_info
from mergepipe.storage.file_errors import explained

PATTERNS = (
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
"""Names of files that are copied from the base."""

FOLDERS = ("additional_chat_templates",)
"""Folders whose files belong to them."""


def side_files(source: Path, withheld: Iterable[str] = ()) -> list[Path]:
    """The files of a model that are copied beside the weights; those in folders after the others.

    Parameters
    ----------
    source : Path
        The model's folder; one that is a file, or not there yet, has none.
    withheld : iterable of str
        Patterns of files and folders to leave out.

    Raises
    ------
    CheckpointError
        If one of them is a link to nothing, a pipe or a device, or the folder can't be read.
    """
    with explained([source]):
        named = [path for pattern in PATTERNS for path in sorted(source.glob(pattern))]
        folders = [path for name in FOLDERS if (path := source / name).is_dir()]
        chosen, folders = (
            [path for path in paths if not any(path.match(pattern) for pattern in withheld)]
            for paths in (dict.fromkeys(named), folders)
        )
        found = [path for path in chosen if not path.name.endswith((".safetensors", ".bin", ".part"))]
        found += [path for folder in folders for path in sorted(folder.iterdir())]
        return [path for path in found if _is_file(path)]


def _is_file(path: Path) -> bool:
    """Whether it is a file, and not a folder; anything else is refused: left out, it would be missed in the output."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise CheckpointError(f"'{path}' is a link to nothing: bring the file back, or remove the link") from None
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode):
        return stat.S_ISREG(mode)
    raise CheckpointError(f"'{path}' is neither a file nor a folder: expected a file that goes beside the weights")


def look_at(source: Path, withheld: Iterable[str] = ()) -> tuple[FileInfo, ...]:
    """What a plan keeps of these files; raises as :func:`side_files`."""
    return tuple(file_info(path) for path in side_files(source, withheld))


def check_unchanged(files: Sequence[FileInfo], source: Path, withheld: Iterable[str] = ()) -> Inputs:
    """Refuse to copy files that are not the ones a plan was made for.

    Parameters
    ----------
    files : sequence of FileInfo
        What :func:`look_at` found then.
    source : Path
    withheld : iterable of str

    Returns
    -------
    Inputs
        Which tell later whether they stayed so.

    Raises
    ------
    InputChangedError
        Naming a file that is another one, is gone or has come since.
    """
    inputs = Inputs(files, use=BESIDE)
    known = {info.path for info in files}
    for info in look_at(source, withheld):
        if info.path not in known:
            raise BESIDE.changed(info, "has come")
    return inputs


def fingerprint(files: Sequence[FileInfo]) -> str:
    """Hash of the names, sizes and times of these files."""
    record = [(Path(info.path).name, info.size, info.mtime_ns) for info in files]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()[:32]


def copy_side_files(
    source: Path, target: Path, changes: Mapping[str, Any], withheld: Iterable[str] = (), drops: Iterable[str] = ()
) -> None:
    """Copy the files that belong beside the weights, a piece at a time, not their modes.

    `changes`, as deep as it is, replace values of `config.json`, whose keys `drops` are left out.
    """
    for path in side_files(source, tuple(withheld)):
        to = target / path.relative_to(source)
        to.parent.mkdir(exist_ok=True)
        if path.name == CONFIG and (changes or drops):
            write_atomic(to, _changed(path, changes, drops))
        else:
            with explained([source]):
                copy_atomic(path, to)


def _changed(path: Path, changes: Mapping[str, Any], drops: Iterable[str]) -> bytes:
    """A configuration with other values; byte for byte as it was if it has these already."""
    with explained([path]):
        config = path.read_bytes()
    try:
        before = json.loads(config)
        values = {key: copy.deepcopy(value) for key, value in before.items() if key not in drops}
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"'{path}' holds no JSON object any more ({error}): bring it back, run again") from error
    put_values(values, changes)
    return config if values == before else to_json(values)


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


def top_names(files: Sequence[FileInfo], source: Path) -> set[str]:
    """Their names in a folder that they are copied to."""
    return {Path(os.path.relpath(info.path, source)).parts[0] for info in files}
