"""Takes over one sealed shard of a proof: checks it, notes what was in it, and removes it.

The command of ``mergepipe run --on-shard``. A run that is killed may hand the same shard over twice, and the command of
a dead run may still be at work beside that of the next: whoever comes second must find the same bytes, or nothing.

    python -m benchmarks.proof_receive LEDGER SHARD
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import google_crc32c
from safetensors import safe_open

PIECE = 16 << 20


def contents(path: Path) -> dict[str, Any]:
    """What a shard holds: `file`, `bytes`, `sha256`, and the crc32c of each of its `tensors`.

    The safetensors library is asked too whether the header is sound and the file complete. Pages that were read are
    dropped from the cache, which is left to the inputs.
    """
    with safe_open(path, framework="np") as opened:
        known = set(opened.keys())
    with path.open("rb", buffering=0) as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little"))
        entries = {name: entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"}
        assert set(entries) == known, "the library sees other tensors than the header has"
        whole, at, checksums = hashlib.sha256(length + header), 0, {}
        for name, (start, stop) in sorted(entries.items(), key=lambda item: item[1]):
            assert start == at, f"'{name}' begins at {start}, not at {at}"
            checksums[name] = 0
            while at < stop:
                data = file.read(min(PIECE, stop - at))
                assert data, f"'{path}' ends within '{name}'"
                whole.update(data)
                checksums[name] = google_crc32c.extend(checksums[name], data)
                at += len(data)
                os.posix_fadvise(file.fileno(), 0, file.tell(), os.POSIX_FADV_DONTNEED)
        assert not file.read(1), f"'{path}' goes on behind its last tensor"
        return {"file": path.name, "bytes": file.tell(), "sha256": whole.hexdigest(), "tensors": checksums}


def receive(ledger: Path, path: Path) -> None:
    """Note what a shard holds in the folder `ledger`, and remove it; a shard that is there already must be the same.

    Raises
    ------
    ValueError
        If the shard came before with other bytes.
    """
    note = ledger / f"{path.name}.json"
    try:
        found = contents(path)
    except FileNotFoundError:
        if note.exists():
            return  # the command of a dead run was faster
        raise
    if note.exists() and json.loads(note.read_text(encoding="utf-8")) != found:
        raise ValueError(f"'{path.name}' was handed over before, with other bytes")
    temporary = ledger / f"{path.name}.{os.getpid()}"
    temporary.write_text(json.dumps(found))
    temporary.replace(note)
    path.unlink(missing_ok=True)


def received(ledger: Path) -> list[dict[str, Any]]:
    """Everything that was taken over, by name of the file."""
    return [json.loads(note.read_text(encoding="utf-8")) for note in sorted(ledger.glob("*.json"))]


if __name__ == "__main__":
    receive(Path(sys.argv[1]), Path(sys.argv[2]))
