"""The zarr v3 hierarchy that stands for a checkpoint: its metadata documents and the keys of its chunks.

The same documents serve the virtual store, the copied store (with a checksum codec added) and the kerchunk references.
They are never written to disk beside missing chunks, which any zarr reader would take for zeros. zarr itself is not
needed to make them, and takes a fifth of a second to import: a merge from virtual stores does without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from mergepipe.storage.chunks import grid_shape
from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.manifest import ChunkManifest, ManifestArray

GROUP_DOCUMENT = {"zarr_format": 3, "node_type": "group", "attributes": {}}


def array_document(array: ManifestArray, *, checksum: bool = False) -> dict[str, Any]:
    """The ``zarr.json`` of one tensor.

    Parameters
    ----------
    array : ManifestArray
    checksum : bool, default False
        Whether chunks are followed by their crc32c, as in a copied store.

    Notes
    -----
    Types that zarr has no name for (fp8) are stored as ``uint8``; the attribute ``safetensors_dtype`` always keeps the
    original name.
    """
    dtype = DTYPES[array.dtype]
    kind = "uint8" if dtype.role == "refused" else dtype.alias
    fill: bool | int | float = False if kind == "bool" else 0.0 if "float" in kind else 0
    codecs: list[dict[str, Any]] = [{"name": "bytes"}]
    if dtype.itemsize > 1:
        codecs[0]["configuration"] = {"endian": "little"}
    if checksum:
        codecs.append({"name": "crc32c"})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(array.shape),
        "data_type": kind,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(array.chunk_shape)}},
        # One folder per tensor, not one per row block.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": {"safetensors_dtype": array.dtype},
    }


def hierarchy_documents(manifest: ChunkManifest, *, checksum: bool = False) -> dict[str, bytes]:
    """All metadata documents of a manifest by their keys, parents before children."""
    documents: dict[str, bytes] = {"zarr.json": json.dumps(GROUP_DOCUMENT).encode()}
    made: dict[tuple[str, tuple[int, ...], tuple[int, ...]], bytes] = {}
    for name, array in manifest.arrays.items():
        parts = name.split("/")
        for count in range(1, len(parts)):
            documents["/".join([*parts[:count], "zarr.json"])] = documents["zarr.json"]
        kind = array.dtype, array.shape, array.chunk_shape
        if kind not in made:
            made[kind] = json.dumps(array_document(array, checksum=checksum)).encode()
        documents[f"{name}/zarr.json"] = made[kind]
    return documents


def chunk_keys(array: ManifestArray) -> Iterator[str]:
    """Last path segment of the key of every chunk, in C order of the grid.

    Notes
    -----
    ``c.0.0``, ``c.1.0`` and so on; ``c`` alone for a tensor without dimensions.
    """
    return iter(_chunk_keys(grid_shape(array.shape, array.chunk_shape)))


@lru_cache(256)
def _chunk_keys(grid: tuple[int, ...]) -> tuple[str, ...]:
    return tuple(".".join(["c", *map(str, index)]) for index in np.ndindex(*grid))


def chunk_bytes(array: ManifestArray) -> int:
    """Bytes of a whole chunk, padding included."""
    return math.prod(array.chunk_shape) * DTYPES[array.dtype].itemsize
