"""The output layout: every byte has one place, whatever the tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.storage.dtypes import DTYPES
from mergepipe.storage.header import read_header
from mergepipe.storage.layout import OutputTensor, group_by_size, lay_out
from mergepipe.storage.writer import ShardWriter

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
tensors = st.lists(
    st.tuples(st.sampled_from(["F64", "F32", "BF16", "F16", "I64", "U8", "BOOL"]), shapes), min_size=1, max_size=12
).map(lambda found: [OutputTensor(f"t{number}", dtype, shape) for number, (dtype, shape) in enumerate(found)])


@given(tensors, st.integers(1, 200))
def test_layout_has_no_hole_and_no_overlap(found: list[OutputTensor], shard_bytes: int) -> None:
    layout = lay_out(group_by_size(found, shard_bytes), {"format": "pt"})
    assert sorted(layout.places) == sorted(tensor.name for tensor in found)
    for shard in layout.shards:
        assert len(shard.header) % 4096 == 0
        at = len(shard.header)
        for place in shard.tensors:
            assert place.offset == at
            assert place.offset % DTYPES[place.dtype].itemsize == 0, "every tensor is aligned to its own type"
            assert place.nbytes == math.prod(place.shape) * DTYPES[place.dtype].itemsize
            at += place.nbytes
        assert shard.size == at


@given(tensors, st.integers(1, 200))
def test_groups_keep_the_order_and_the_limit(found: list[OutputTensor], shard_bytes: int) -> None:
    groups = group_by_size(found, shard_bytes)
    assert [tensor for group in groups for tensor in group] == found
    for group in groups:
        filled = [tensor.nbytes for tensor in group if tensor.nbytes]
        assert len(filled) <= 1 or sum(filled) <= shard_bytes


def test_index_names_every_tensor_once() -> None:
    groups = [[OutputTensor("b", "F32", (2,))], [OutputTensor("a", "BF16", (3,))]]
    layout = lay_out(groups, {})
    index = layout.index
    assert index == {
        "metadata": {"total_size": 14},
        "weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"},
    }
    assert lay_out([groups[0]], {}).index is None


def test_a_written_layout_opens_as_safetensors(tmp_path: Path) -> None:
    layout = lay_out([[OutputTensor("b", "F32", (2, 3)), OutputTensor("e", "F32", (0, 3))]], {"format": "pt"})
    writer = ShardWriter(tmp_path, layout.shards[0])
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    writer.write(layout.places["b"].offset, values)
    sealed = writer.seal()
    writer.publish()
    loaded = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert loaded["b"].tobytes() == values.tobytes()
    assert loaded["e"].shape == (0, 3)
    assert sealed.size == (tmp_path / "model.safetensors").stat().st_size
    assert read_header(tmp_path / "model.safetensors").metadata == {"format": "pt"}
