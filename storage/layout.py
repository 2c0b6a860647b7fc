"""Where every output byte goes: decided from shapes and types alone, before the first byte exists.

Pure arithmetic. The data section of each shard starts on a multiple of 4,096 bytes, so that whole pages can be written
past the page cache; tensors lie wide types first, so that each is aligned to its own element size whatever was mixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import encode_header

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written: its name, safetensors dtype and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor with its place: the shard's number and the absolute offset in that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """One output file: its name, its header (length field included), its size and its tensors in byte order."""

    file: str
    header: bytes
    size: int
    tensors: tuple[PlacedTensor, ...]


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """All output files of a merge."""

    shards: tuple[ShardLayout, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(shard.size for shard in self.shards)

    @property
    def places(self) -> dict[str, PlacedTensor]:
        """The place of each tensor, by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @property
    def index(self) -> dict[str, object] | None:
        """Contents of the index file; None where one file holds everything."""
        if len(self.shards) == 1:
            return None
        total = sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)
        weight_map = {tensor.name: shard.file for shard in self.shards for tensor in shard.tensors}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def group_by_size(tensors: Sequence[OutputTensor], shard_bytes: int) -> list[list[OutputTensor]]:
    """Fill shards in order up to `shard_bytes`; a larger tensor gets a shard of its own.

    Examples
    --------
    >>> tensors = [OutputTensor(name, "F32", (10,)) for name in "abc"]
    >>> [[t.name for t in group] for group in group_by_size(tensors, 80)]
    [['a', 'b'], ['c']]
    """
    groups: list[list[OutputTensor]] = []
    filled = 0
    for tensor in tensors:
        if not groups or (filled and filled + tensor.nbytes > shard_bytes):
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    return groups


def lay_out(groups: Sequence[Sequence[OutputTensor]], metadata: Mapping[str, str], stem: str = "model") -> OutputLayout:
    """Place every tensor of every group; a group becomes a shard.

    Parameters
    ----------
    groups : sequence of sequence of OutputTensor
        One group per shard, each in the order wanted; wider element types are moved to the front.
    metadata : mapping of str to str
        The `__metadata__` of each header.
    stem : str
        What file names begin with.

    Returns
    -------
    OutputLayout
        With standard file names: `model.safetensors`, or `model-00001-of-00004.safetensors` and so on.

    Examples
    --------
    >>> layout = lay_out([[OutputTensor("a", "F32", (2, 2)), OutputTensor("b", "BF16", ())]], {"format": "pt"})
    >>> [(t.name, t.offset, t.nbytes) for t in layout.shards[0].tensors], layout.shards[0].file
    ([('a', 4096, 16), ('b', 4112, 2)], 'model.safetensors')
    """
    shards = []
    for number, group in enumerate(groups):
        ordered = sorted(group, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
        header = encode_header([(t.name, t.dtype, t.shape) for t in ordered], metadata)
        offset = len(header)
        placed = []
        for tensor in ordered:
            placed.append(PlacedTensor(tensor.name, tensor.dtype, tensor.shape, number, offset, tensor.nbytes))
            offset += tensor.nbytes
        which = "" if len(groups) == 1 else f"-{number + 1:05d}-of-{len(groups):05d}"
        name = f"{stem}{which}.safetensors"
        shards.append(ShardLayout(name, header, offset, tuple(placed)))
    return OutputLayout(tuple(shards))
