"""The manifest of a finished output, read back: proved before a word of it is believed."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeGuard

from mergepipe.errors import CheckpointError, CheckpointNotFoundError
from mergepipe.storage.checkpoint import is_file_name, read_json

MANIFEST_NAME = "mergepipe_manifest.json"


def read_record(folder: Path) -> dict[str, Any]:
    """The manifest in an output folder, as :func:`mergepipe.pipeline.outputs.manifest` made it.

    Returns
    -------
    dict
        With `plan`, a text, and `shards`, a list of at least one: each names a file of this folder, its bytes and a
        checksum for each run of its bytes. What else it holds is not looked at.

    Raises
    ------
    ValueError
        If there is none, or it is none; says why.
    """
    try:
        record = read_json(folder / MANIFEST_NAME, strict=False)
    except CheckpointNotFoundError:
        raise ValueError("is missing") from None
    except CheckpointError:
        raise ValueError("is no JSON object") from None
    if not isinstance(record.get("plan"), str):
        raise ValueError("does not say which plan it is of")
    shards = record.get("shards")
    if not isinstance(shards, list) or not shards:
        raise ValueError("lists no files")
    for number, shard in enumerate(shards):
        if not isinstance(shard, dict) or not is_file_name(shard.get("file")):
            raise ValueError(f"names no file of this folder as its shard {number}")
        size, window, sums = shard.get("bytes"), shard.get("crc32c_bytes"), shard.get("crc32c")
        if not (_is_count(size) and _is_count(window) and window > 0 and isinstance(sums, list)):
            raise ValueError(f"has no size and no checksums of '{shard['file']}'")
        if len(sums) != -(-size // window) or not all(map(_is_count, sums)):
            raise ValueError(f"has not one checksum for every {window:,} bytes of '{shard['file']}'")
    return record


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
