"""Writing past the page cache, and hashing what is written in passing."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import DamageError
from mergepipe.storage import digest as digest_module
from mergepipe.storage import writer as writer_module
from mergepipe.storage.checksum import crc32c
from mergepipe.storage.digest import GRAIN_BYTES, WINDOW_BYTES, Digest, Held
from mergepipe.storage.layout import OutputTensor, lay_out
from mergepipe.storage.writer import PAGE, ShardWriter

U8 = npt.NDArray[np.uint8]


def at_place(data: bytes, place: int) -> U8:
    """The bytes in memory, `place` bytes into a page."""
    memory = np.zeros(len(data) + 2 * PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE + place
    memory[start : start + len(data)] = np.frombuffer(data, np.uint8)
    return memory[start : start + len(data)]


@given(
    cuts=st.lists(st.integers(0, 60_000), max_size=5),
    same=st.booleans(),
    direct=st.booleans(),
    passing=st.booleans(),
    seed=st.integers(0, 9),
)
def test_any_pieces_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], same: bool, direct: bool, passing: bool, seed: int
) -> None:
    """Pieces from the same place of a page as in the file, or not, with or without O_DIRECT: the same file."""
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 256, 60_000, np.uint8).tobytes()
    shard = lay_out([[OutputTensor("w", "U8", (60_000,))]], {"format": "pt"}).shards[0]
    writer = ShardWriter(tmp_path_factory.mktemp("out"), shard)
    if passing:
        writer.hash_in_passing(sha256=True, held=Held(32 * PAGE))
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
    assert writer._digest is not None
    assert writer._digest.bytes_back == (0 if passing else shard.size)
    writer.close()
    whole = writer.part.read_bytes()
    assert whole == shard.header + content
    assert sealed.sha256 == hashlib.sha256(whole).hexdigest()
    assert sealed.crc32c == (crc32c(np.frombuffer(whole, np.uint8)),)


def test_what_an_earlier_run_wrote_is_read_back_before_sealing(tmp_path: Path) -> None:
    size = 3 * WINDOW_BYTES
    shard = lay_out([[OutputTensor("w", "U8", (size,))]], {"format": "pt"}).shards[0]
    writer = ShardWriter(tmp_path, shard)
    writer.hash_in_passing(sha256=True, held=Held())
    begin = shard.tensors[0].offset
    half = size // 2
    writer.write(begin + half, np.ones(size - half, np.uint8))
    writer.follow()
    digest = writer._digest
    assert digest is not None
    assert digest.position == begin, "the front is missing"
    writer.mark(begin, begin + half)
    writer.follow()
    assert (digest.position, digest.bytes_back) == (shard.size, half)
    sealed = writer.seal()
    writer.close()
    assert sealed.sha256 == hashlib.sha256(writer.part.read_bytes()).hexdigest()


def digest_of(path: Path, content: U8, pieces: list[tuple[int, int]], held: Held | None) -> Digest:
    """Write the pieces in their order, with a digest beside them."""
    path.touch()
    digest = Digest(path, sha256=True, held=held)
    with path.open("r+b") as file:
        for start, stop in pieces:
            file.seek(start)
            file.write(content[start:stop].data)
            file.flush()
            digest.put(start, content[start:stop])
    return digest


@pytest.mark.parametrize("held", [None, Held(2 * PAGE), Held(64 * PAGE)], ids=["nothing held", "little", "all"])
def test_what_can_not_be_held_is_read_back(tmp_path: Path, held: Held | None) -> None:
    content = np.random.default_rng(0).integers(0, 256, 20 * PAGE + 77, np.uint8)
    edges = [*range(0, content.nbytes, PAGE + 5), content.nbytes]
    pieces = list(itertools.pairwise(edges))[::-1]
    digest = digest_of(tmp_path / "file", content, pieces, held)
    digest.advance(content.nbytes)
    digest.close()
    assert digest.sha256 == hashlib.sha256(content.tobytes()).hexdigest()
    assert digest.crc32c == [crc32c(content)]
    nothing_back, all_back = digest.bytes_back == 0, digest.bytes_back >= content.nbytes - (PAGE + 5)
    assert (nothing_back, all_back) == (held is not None and held._arena.size > 2 * PAGE, held is None)
    assert held is None or held._arena.free == held._arena.size, "the memory of others is given back"


def test_the_nearest_piece_is_held(tmp_path: Path) -> None:
    content = np.random.default_rng(1).integers(0, 256, 4 * PAGE, np.uint8)
    pieces = [(3 * PAGE, 4 * PAGE), (2 * PAGE, 3 * PAGE), (PAGE, 2 * PAGE), (0, PAGE)]
    digest = digest_of(tmp_path / "file", content, pieces, Held(2 * PAGE))
    assert (digest.position, digest.bytes_back) == (3 * PAGE, 0)
    digest.close()


@pytest.mark.parametrize("again", [(0, 10), (60, 70), (35, 45), (45, 80)], ids=str)
def test_bytes_written_twice(tmp_path: Path, again: tuple[int, int]) -> None:
    """What counts is what is in the file in the end."""
    content = np.arange(100, dtype=np.uint8)
    path = tmp_path / "file"
    digest = digest_of(path, content, [(0, 40), (50, 90)], Held())
    after = content.copy()
    after[slice(*again)] = 255
    with path.open("r+b") as file:
        for start, stop in (again, (40, 50), (90, 100)):
            file.seek(start)
            file.write(after[start:stop].data)
            file.flush()
            digest.put(start, after[start:stop])
    digest.advance(100)
    digest.close()
    assert digest.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_checksums_per_grain(tmp_path: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 2 * GRAIN_BYTES + 12_345, np.uint8)
    path = tmp_path / "file"
    content.tofile(path)
    digest = Digest(path, sha256=True)
    for stop in (1, GRAIN_BYTES - 1, GRAIN_BYTES + 5):
        digest.advance(stop)
        assert digest.position <= stop
    digest.advance(content.nbytes)
    digest.close()
    assert digest.crc32c == [crc32c(content[i : i + GRAIN_BYTES]) for i in range(0, content.nbytes, GRAIN_BYTES)]
    assert digest.sha256 == hashlib.sha256(content.tobytes()).hexdigest()


@given(cuts=st.lists(st.integers(0, 5_000), max_size=8), held=st.booleans(), seed=st.integers(0, 9))
def test_pieces_over_grains(tmp_path_factory: pytest.TempPathFactory, cuts: list[int], held: bool, seed: int) -> None:
    """Each piece has its own checksum and is part of those of the grains; memory is gone over once."""
    rng = np.random.default_rng(seed)
    content = rng.integers(0, 256, 5_000, np.uint8)
    pieces = list(itertools.pairwise(sorted({0, 5_000, *cuts})))
    rng.shuffle(pieces)
    looked_at = []

    def counted(data: U8) -> int:
        looked_at.append(data.nbytes)
        return crc32c(data)

    path = tmp_path_factory.mktemp("out") / "file"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest_module, "GRAIN_BYTES", 700)
        patch.setattr(digest_module, "crc32c", counted)
        content.tofile(path)
        digest = Digest(path, sha256=True, held=Held() if held else None)
        for start, stop in pieces:
            assert digest.put(start, content[start:stop]) == crc32c(content[start:stop])
        assert sum(looked_at) == content.nbytes
        digest.advance(content.nbytes)
    digest.close()
    assert digest.crc32c == [crc32c(content[i : i + 700]) for i in range(0, content.nbytes, 700)]
    assert digest.sha256 == hashlib.sha256(content.tobytes()).hexdigest()
    assert sum(looked_at) == content.nbytes + digest.bytes_back
    assert not (held and digest.bytes_back)


def test_a_file_that_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100))
    digest = Digest(path, sha256=False)
    with pytest.raises(DamageError, match="ends at byte 100, expected 101"):
        digest.advance(101)
    digest.close()
