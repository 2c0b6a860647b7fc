"""Rows gathered from several sources read as the tensor they make up, by both readers and from both kinds of store."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from mergepipe.errors import WorkspaceError
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.storage.copied import copy_store
from mergepipe.storage.direct import DirectReader
from mergepipe.storage.gather import GATHER_BYTES, GatheredArray, GatheredManifest, Pieces, RowMap
from mergepipe.storage.manifest import ChunkManifest, virtual_manifest
from mergepipe.storage.readers import MmapReader


def sources(folder: Path, rows: tuple[int, ...], row: tuple[int, ...], dtype: str = "f4") -> list[np.ndarray]:
    """One checkpoint folder per number of rows, `0`, `1`, ...; their arrays."""
    rng = np.random.default_rng(3)
    arrays = []
    for number, count in enumerate(rows):
        arrays.append(rng.standard_normal((count, *row)).astype(dtype))
        (folder / str(number)).mkdir()
        tensors = {"a.pad": np.zeros(3, "f4"), "w": arrays[-1], "z": np.ones(5, "f4")}
        save_file(tensors, folder / str(number) / "model.safetensors")
    return arrays


@pytest.fixture(params=["virtual", "copy"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def manifests(folder: Path, count: int, kind: str) -> list[ChunkManifest]:
    """The manifest of each source; copies are cut into chunks smaller than a row."""
    found = []
    for number in range(count):
        checkpoint = open_checkpoint(folder / str(number))
        copy = kind == "copy"
        found.append(copy_store(checkpoint, folder / f"copy-{number}", 100) if copy else virtual_manifest(checkpoint))
    return found


def gathered(parts: list[ChunkManifest], row_map: RowMap, row: tuple[int, ...], dtype: str = "F32") -> GatheredManifest:
    """The first source with its tensor gathered."""
    array = GatheredArray.of(dtype, row, row_map, {number: (part, "w") for number, part in enumerate(parts)})
    first = parts[0]
    return GatheredManifest(first.kind, first.files, first.arrays, {"w": array})


def check(manifest: GatheredManifest, expected: np.ndarray, windows: list[tuple[int, int]]) -> None:
    """Every window reads as the same part of `expected`, mapped and past the page cache."""
    flat = expected.reshape(-1)
    with MmapReader() as mapped, DirectReader(1 << 20) as direct:
        for reader in (mapped, direct):
            for start, stop in windows:
                with reader.window(manifest.segments("w", start, stop), last=True) as window:
                    assert window.view(flat.dtype).tobytes() == flat[start:stop].tobytes(), (reader, start, stop)


def test_any_map_reads_as_the_rows_it_names(tmp_path: Path, kind: str) -> None:
    """Permuted, repeated and borrowed rows; windows that begin and end inside rows."""
    arrays = sources(tmp_path, (40, 25, 3), (7, 9))
    rng = np.random.default_rng(0)
    which = rng.integers(0, 3, 90)
    rows = np.array([rng.integers(0, len(arrays[s])) for s in which])
    which[10:30], rows[10:30] = 0, np.arange(5, 25)
    manifest = gathered(manifests(tmp_path, 3, kind), RowMap.of(which, rows), (7, 9))
    expected = np.stack([arrays[s][r] for s, r in zip(which, rows, strict=True)])
    assert manifest.shape("w") == expected.shape
    assert manifest.shape("z") == (5,)
    size = expected.size
    cuts = sorted(rng.integers(0, size, 12).tolist())
    check(manifest, expected, [(0, size), (0, 0), (11 * 63, 12 * 63), *itertools.pairwise(cuts)])


def test_a_vector_is_gathered_element_by_element(tmp_path: Path, kind: str) -> None:
    """Biases have one element a row."""
    arrays = sources(tmp_path, (3000, 500), ())
    order = np.random.default_rng(1).permutation(3500)
    row_map = RowMap.of(order >= 3000, np.where(order < 3000, order, order - 3000))
    manifest = gathered(manifests(tmp_path, 2, kind), row_map, ())
    check(manifest, np.concatenate(arrays)[order], [(0, 3500), (17, 2211)])


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9)), min_size=1, max_size=60))
@settings(max_examples=50, deadline=None)
def test_a_map_says_what_it_was_made_of(pairs: list[tuple[int, int]]) -> None:
    which, rows = (np.array(column) for column in zip(*pairs, strict=True))
    found = RowMap.of(which, rows)
    lengths = np.diff(found.starts)
    assert np.repeat(found.sources, lengths).tolist() == which.tolist()
    offsets = np.arange(found.rows) - np.repeat(found.starts[:-1], lengths)
    assert (np.repeat(found.firsts, lengths) + offsets).tolist() == rows.tolist()


def test_a_long_run_is_one_segment_that_can_be_mapped(tmp_path: Path) -> None:
    sources(tmp_path, (100, 4), (16,))
    row_map = RowMap.of(np.repeat([0, 1], [100, 4]), np.r_[0:100, 0:4])
    manifest = gathered(manifests(tmp_path, 2, "virtual"), row_map, (16,))
    assert len(manifest.segments("w", 0, 100 * 16)) == 1
    assert len(manifest.segments("w", 90 * 16, 104 * 16)) == 2


def test_windows_are_known_again_and_take_no_memory_until_they_are_read(tmp_path: Path) -> None:
    """A reader keeps windows by what they consist of; a hundred thousand pieces must not all be held for that."""
    rows = 100_000
    sources(tmp_path, (rows,), (8,))
    manifest = gathered(manifests(tmp_path, 1, "virtual"), RowMap.of(np.zeros(rows), np.arange(rows)[::-1]), (8,))
    one = manifest.segments("w", 0, rows * 8)
    assert isinstance(one, Pieces)
    assert one == manifest.segments("w", 0, rows * 8)
    assert hash(one) == hash(manifest.segments("w", 0, rows * 8))
    assert one != manifest.segments("w", 0, rows * 8 - 1)
    with MmapReader() as reader:
        tracemalloc.start()
        with reader.window(one, last=False) as window:
            assert window.nbytes == one.nbytes
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < one.nbytes + GATHER_BYTES


def test_a_saved_map_is_the_same_or_refused(tmp_path: Path) -> None:
    row_map = RowMap.of(np.array([0, 1, 1]), np.array([4, 2, 3]))
    path = tmp_path / "map"
    row_map.save(path)
    again = RowMap.load(path, row_map.digest)
    assert (again.rows, again.firsts.tolist(), again.sources.tolist()) == (3, [4, 2], [0, 1])
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with pytest.raises(WorkspaceError, match="build the workspace again"):
        RowMap.load(path, row_map.digest)
    path.unlink()
    with pytest.raises(WorkspaceError, match="gone"):
        RowMap.load(path, row_map.digest)


def test_an_identity_is_seen() -> None:
    zeros = np.zeros(4, np.int64)
    assert RowMap.of(zeros, np.arange(4)).is_identity(0, 4)
    assert not RowMap.of(zeros, np.arange(4)).is_identity(1, 4)
    assert not RowMap.of(zeros, np.arange(4)).is_identity(0, 5)
    assert not RowMap.of(zeros, np.arange(1, 5)).is_identity(0, 4)
