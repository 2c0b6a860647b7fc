"""Kerchunk references: the hierarchy for readers that know nothing of mergepipe, as one JSON file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mergepipe.storage.hierarchy import chunk_bytes, chunk_keys, hierarchy_documents
from mergepipe.storage.manifest import ChunkManifest, ManifestArray, Segment
from mergepipe.storage.readers import Descriptors

REFERENCES = "kerchunk.json"
"""Name of the file in the folder of a store."""


def write_references(manifest: ChunkManifest, path: str | Path) -> None:
    """Write the references of version 0: key to text, or to [URL, offset, length].

    Parameters
    ----------
    manifest : ChunkManifest
    path : path-like
        Written over. fsspec's ``ReferenceFileSystem`` reads it; a reader of bfloat16 tensors needs a zarr that knows
        the type.

    Notes
    -----
    A range can't be padded. That of a chunk at the padded edge therefore runs on into the bytes that follow in the
    file; a reader cuts them off, because they lie outside the array. Where the file ends before that, the chunk is
    written into the references as base64 (at most one chunk's worth of bytes per file, in general).

    The file is written line by line, and the documents of tensors of one type and shape are encoded once: a model of
    45,000 tensors has 29 MB of references.
    """
    with open(path, "w", encoding="ascii") as file:
        separator = "{"
        for key, value in _entries(manifest):
            file.write(f"{separator}{json.dumps(key)}: {value}")
            separator = ", "
        file.write("}")


def _entries(manifest: ChunkManifest) -> Iterator[tuple[str, str]]:
    """Every key with its value as JSON."""
    encoded: dict[bytes, str] = {}
    for key, document in hierarchy_documents(manifest).items():
        if document not in encoded:
            encoded[document] = json.dumps(document.decode())
        yield key, encoded[document]
    urls = [json.dumps(f"file://{info.path}") for info in manifest.files]
    descriptors = Descriptors()
    try:
        for name, array in manifest.arrays.items():
            yield from _chunks(manifest, name, array, urls, descriptors)
    finally:
        descriptors.close()


def _chunks(
    manifest: ChunkManifest, name: str, array: ManifestArray, urls: list[str], descriptors: Descriptors
) -> Iterator[tuple[str, str]]:
    whole = chunk_bytes(array)
    places = zip(array.files.tolist(), array.offsets.tolist(), array.lengths.tolist(), strict=True)
    for key, (number, offset, length) in zip(chunk_keys(array), places, strict=True):
        file = manifest.files[number]
        if offset + whole <= file.size:
            yield f"{name}/{key}", f"[{urls[number]}, {offset}, {whole}]"
        else:
            padded = _padded(descriptors, Segment(file.path, offset, length), whole)
            yield f"{name}/{key}", f'"base64:{padded}"'


def _padded(descriptors: Descriptors, segment: Segment, whole: int) -> str:
    out = np.zeros(whole, np.uint8)
    descriptors.read_into(segment, out[: segment.length].data)
    return base64.b64encode(out.data).decode("ascii")
