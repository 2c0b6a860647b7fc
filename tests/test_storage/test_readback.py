"""Writing past the page cache, and hashing behind the writer."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import DamageError
from mergepipe.storage import writer as writer_module
from mergepipe.storage.layout import OutputTensor, lay_out
from mergepipe.storage.readback import GRAIN_BYTES, WINDOW_BYTES, ReadBack
from mergepipe.storage.writer import PAGE, ShardWriter, crc32c


def at_place(data: bytes, place: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """The bytes in memory, `place` bytes into a page."""
    memory = np.zeros(len(data) + 2 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE + place
    memory[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return memory[start : start + len(data)]


@given(
    cuts=st.lists(st.integers(0, 60_000), max_size=5), same=st.booleans(), direct=st.booleans(), seed=st.integers(0, 9)
)
def test_any_pieces_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], same: bool, direct: bool, seed: int
) -> None:
    """Pieces from the same place of a page as in the file, or not, with or without O_DIRECT: the same file."""
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 256, 60_000, np.uint8).tobytes()
    shard = lay_out([[OutputTensor("w", "U8", (60_000,))]], {"format": "pt"}).shards[0]
    writer = ShardWriter(tmp_path_factory.mktemp("out"), shard)
    if not direct and writer._direct >= 0:
        writer_module.os.close(writer._direct)
        writer._direct = -1
    edges = sorted({0, 60_000, *cuts})
    pieces = list(itertools.pairwise(edges))
    rng.shuffle(pieces)
    begin = shard.tensors[0].offset
    for start, stop in pieces:
        writer.write(begin + start, at_place(content[start:stop], (begin + start) % PAGE if same else 8))
        writer.follow()
    sealed = writer.seal()
    writer.close()
    whole = writer.part.read_bytes()
    assert whole == shard.header + content
    assert sealed.sha256 == hashlib.sha256(whole).hexdigest()
    assert sealed.crc32c == (crc32c(np.frombuffer(whole, np.uint8)),)


def test_sealing_has_little_left_to_read(tmp_path: Path) -> None:
    size = 3 * WINDOW_BYTES
    shard = lay_out([[OutputTensor("w", "U8", (size,))]], {"format": "pt"}).shards[0]
    writer = ShardWriter(tmp_path, shard)
    begin = shard.tensors[0].offset
    half = size // 2
    writer.write(begin + half, np.ones(size - half, np.uint8))
    writer.follow()
    assert writer._back is not None
    assert writer._back.position == 0, "the front is missing"
    writer.mark(begin, begin + half)
    writer.follow()
    assert writer._back.position == size
    writer.seal()
    writer.close()


def test_checksums_per_grain(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 2 * GRAIN_BYTES + 12_345, np.uint8)
    path = tmp_path / "file"
    content.tofile(path)
    back = ReadBack(path, sha256=True)
    for stop in (1, GRAIN_BYTES - 1, GRAIN_BYTES + 5):
        back.advance(stop)
        assert back.position <= stop
    back.advance(content.nbytes, whole=True)
    back.close()
    assert back.crc32c == [crc32c(content[i : i + GRAIN_BYTES]) for i in range(0, content.nbytes, GRAIN_BYTES)]
    assert back.sha256 == hashlib.sha256(content.tobytes()).hexdigest()


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    back = ReadBack(path, sha256=False)
    with pytest.raises(DamageError, match="ends at byte 100, expected 101"):
        back.advance(101, whole=True)
    back.close()
