"""A guess at the threshold of scores is never believed unless it is right, and leaves what the sure way leaves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergepipe.tasks import convert, fusion_guess, rows_torch, score_lists, squares
from mergepipe.tasks.blocks import block_bounds
from mergepipe.tasks.fusion_guess import MOVED, WINDOW
from mergepipe.tasks.listed import Listed, Room
from mergepipe.tasks.method import (
    Accumulator,
    Array,
    Job,
    State,
    can_offload,
    expected_reads,
    lasting,
    stored_sweep,
    values_listed,
)
from support.bits import as_stored
from support.drive import load_tile, make_job
from support.gpu import on_every_device

SHAPE = (1100, 2048)
"""35 blocks, the last of which is shorter."""

GUESSED = ["sample", "row divergence"]
SURE = ["row divergence", "fine histogram 1 of scores"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guesses for tensors of few blocks, from every second of them."""
    monkeypatch.setattr(fusion_guess, "FEWEST_BLOCKS", 32)
    monkeypatch.setattr(fusion_guess, "sampled_every", lambda blocks: 2)


class Merge:
    """A stored primary and donors whose rows have moved more and less, and the sweeps over them."""

    def __init__(self, spread: float = 0.1, donors: int = 2, params: dict[str, Any] | None = None, seed: int = 0):
        rng = np.random.default_rng(seed)
        base = rng.normal(0, 0.02, SHAPE)
        moved = [np.exp(rng.normal(0, spread, (SHAPE[0], 1))) * rng.normal(0, 1e-3, SHAPE) for _ in range(donors)]
        self.values = [base.astype("f4"), *((base + one).astype("f4") for one in moved)]
        self.method, job = make_job("scf_rkl", SHAPE, "f4", [{}] * donors, params or {})
        self.job = replace(job, halves=True)
        self.encode()

    def encode(self) -> None:
        """Round to what is stored."""
        self.bits = [np.empty(value.size, np.uint16) for value in self.values]
        for value, bits in zip(self.values, self.bits, strict=True):
            convert.encode(value.ravel(), "BF16", bits)
            convert.decode(bits, "BF16", value.reshape(-1))

    def run(self, job: Job, way: str, room: Room | None = None) -> tuple[State, list[str]]:
        """The state that lasts, and which sweeps were made: from stored bits, by tiles, or with another device."""
        state: State = {}
        made = []
        for sweep in self.method.reductions(job):
            if not sweep.needed(job, state):
                continue
            made.append(sweep.name)
            counts, row = sweep.shapes(job)
            most = values_listed([sweep], job)
            total = Accumulator(
                None if counts is None else np.zeros(counts, np.int64),
                None if row is None else np.zeros((job.blocks, *row)),
                Listed(most, room or Room(most)) if most else None,
            )
            body = stored_sweep(sweep, job, state) if way == "stored" else None
            if body is not None:
                for blocks in ((0, 9), (9, 10), (10, job.blocks)):
                    span = slice(block_bounds(SHAPE, blocks[0])[0], block_bounds(SHAPE, blocks[1] - 1)[1])
                    assert body([as_stored(bits[span]) for bits in self.bits], total, blocks)
            elif way not in ("stored", "tiles") and can_offload(sweep):
                scorer = rows_torch.Scorer(way, rows_torch.lane_bytes(len(self.bits), 65536, 4))
                sweep.offload(job, state, total, self.tiles(), scorer)
            else:
                for tile in self.tiles():
                    sweep.update(job, state, total, tile)
            state |= sweep.combine(job, state, total)
        return lasting(state), made

    def tiles(self) -> Iterator[Any]:
        for index in range(self.job.blocks):
            yield load_tile(self.method, self.job, self.values[1:], self.values[0], index)

    @property
    def roomy(self) -> Job:
        """The same where there is room for lists."""
        return replace(self.job, listed=1 << 40)


def agree(found: State, sure: State) -> None:
    assert sorted(found) == sorted(sure)
    for name, value in sure.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.parametrize("way", ["stored", "tiles"])
@pytest.mark.parametrize(
    "params", [{}, {"quantile": 0.5, "direction": "sym"}, {"quantile": 0.97, "zero_kl": "abs", "scale": 0.5}], ids=str
)
def test_a_guess_leaves_what_the_sure_way_leaves(params: dict[str, Any], way: str) -> None:
    merge = Merge(params=params)
    sure, made = merge.run(merge.job, way)
    assert made == SURE
    found, made = merge.run(merge.roomy, way)
    assert made == GUESSED
    agree(found, sure)
    assert 0.4 < sure["kept_norms"][0] < 1


def test_an_exact_count_and_many_donors() -> None:
    merge = Merge(donors=5, params={"tie_rule": "index"})
    sure, made = merge.run(merge.job, "stored")
    assert made[:2] == SURE
    found, guessed = merge.run(merge.roomy, "stored")
    assert guessed == [*GUESSED, *made[2:]]
    agree(found, sure)


@on_every_device
def test_another_device_lists_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several batches, the last one with a shorter block; of rows that moved as a whole, too."""
    monkeypatch.setattr(rows_torch, "STAGED_BYTES", 3 * 10 * 65536 * 4)
    merge = Merge()
    base, one, other = merge.values
    one[7], other[1098], base[9], one[9] = base[7] + 0.25, base[1098] - 0.125, 3e38, -3e38
    merge.encode()
    sure, _ = merge.run(merge.job, "stored")
    found, made = merge.run(merge.roomy, device)
    assert made == GUESSED
    agree(found, sure)


@pytest.mark.parametrize("quantile", [0.5, 0.9])
def test_odd_rows(quantile: float) -> None:
    """Rows that did not move, that moved as a whole, that differ by more than float32 holds, of weights that are 0."""
    merge = Merge(params={"quantile": quantile})
    base, one, other = merge.values
    one[3], other[3] = base[3], base[3] + 0.5
    base[4], one[4, ::2], other[4] = 3e38, -3e38, 0.0
    base[5] = 0.0
    one[1099] = base[1099] * 1000
    merge.encode()
    sure, _ = merge.run(merge.job, "stored")
    for way in ("stored", "tiles"):
        found, made = merge.run(merge.roomy, way)
        assert made == GUESSED
        agree(found, sure)
    assert np.isinf(sure["_energy_0"][0])


def test_more_than_a_third_of_zeros_is_no_guess_but_a_merge() -> None:
    """The threshold is 0, and so would be the smallest key of the window."""
    merge = Merge(params={"quantile": 0.3})
    merge.values[1][:500] = merge.values[0][:500]
    merge.encode()
    sure, _ = merge.run(merge.job, "stored")
    found, made = merge.run(merge.roomy, "stored")
    assert made == ["sample", *SURE]
    agree(found, sure)
    assert sure["thresholds"][0] == 0 < sure["thresholds"][1]


def test_rows_that_are_too_unlike_are_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion_guess, "IN_WINDOWS", 1 / 64)
    merge = Merge(spread=1.0)
    sure, _ = merge.run(merge.job, "stored")
    found, made = merge.run(merge.roomy, "stored")
    assert made == ["sample", *SURE]
    agree(found, sure)


def look_beside(monkeypatch: pytest.MonkeyPatch, by: int) -> None:
    """Have the first windows lie some bins beside where they should."""
    window = fusion_guess._window

    def beside(whole: Array, groups: Array, share: float) -> tuple[int, int] | None:
        found = window(whole, groups, share)
        return found and (found[0] + (by << 16), found[1] + (by << 16))

    monkeypatch.setattr(fusion_guess, "_window", beside)


@pytest.mark.parametrize("way", ["stored", "tiles"])
@pytest.mark.parametrize("by", [-25, 25])
def test_a_threshold_that_was_missed_is_found_in_one_more_sweep(
    by: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge = Merge(spread=0.02)
    sure, _ = merge.run(merge.job, way)
    look_beside(monkeypatch, by)
    found, made = merge.run(merge.roomy, way)
    assert made == [*GUESSED, "scores where thresholds were missed"]
    agree(found, sure)


def test_a_threshold_that_is_missed_twice_goes_the_sure_way(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = Merge(spread=0.02)
    sure, _ = merge.run(merge.job, "stored")
    moved = fusion_guess.moved
    look_beside(monkeypatch, 25)

    def beside(*how: Any) -> State:
        new = moved(*how)
        return {**new, WINDOW: new[WINDOW] + (40 << 16)}

    monkeypatch.setattr(fusion_guess, "moved", beside)
    found, made = merge.run(merge.roomy, "stored")
    assert made == [
        *GUESSED, "scores where thresholds were missed", "coarse histogram of scores", "fine histogram 1 of scores",
    ]  # fmt: skip
    agree(found, sure)


@pytest.mark.parametrize("numbers", [0, 1000])
def test_a_list_that_does_not_fit_is_not_believed(numbers: int) -> None:
    """The room is for all tensors at work."""
    merge = Merge()
    sure, _ = merge.run(merge.job, "stored")
    found, made = merge.run(merge.roomy, "stored", Room(numbers))
    assert made[:3] == [*GUESSED, "scores where thresholds were missed"]
    agree(found, sure)


def test_without_room_there_is_no_guess_and_with_it_one_read_less() -> None:
    merge = Merge()
    job = replace(merge.job, listed=fusion_guess.most_listed(merge.job) - 1)
    assert merge.run(job, "stored")[1] == SURE
    assert values_listed(merge.method.reductions(job), job) == 0
    assert expected_reads(merge.method.reductions(job), job) == 2
    job = replace(job, listed=job.listed + 1)
    assert values_listed(merge.method.reductions(job), job) == fusion_guess.most_listed(job)
    assert expected_reads(merge.method.reductions(job), job) == 1 + 1 / 16


@pytest.mark.parametrize(
    ("name", "value"),
    [("threshold", "iqr"), ("importance", "pointwise"), ("multi", "fold")],
)
def test_what_is_not_guessed(name: str, value: str) -> None:
    merge = Merge(params={name: value})
    found, made = merge.run(merge.roomy, "tiles")
    assert "sample" not in made
    agree(found, merge.run(merge.job, "tiles")[0])


def test_what_has_longer_differences_is_not_guessed() -> None:
    merge = Merge()
    job = replace(merge.roomy, halves=False)
    assert merge.run(job, "tiles")[1] == SURE


def test_one_donor_that_is_folded_in_is_guessed() -> None:
    merge = Merge(donors=1, params={"multi": "fold"})
    found, made = merge.run(merge.roomy, "stored")
    assert made == GUESSED
    agree(found, merge.run(merge.job, "stored")[0])


@pytest.mark.parametrize("way", ["stored", "tiles", "cpu"])
def test_rows_that_moved_as_a_whole_fit_the_sums(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of equal differences, far larger than their divergence tells: listed once, with their number."""
    monkeypatch.setattr(fusion_guess, "IN_WINDOWS", 1.0)
    monkeypatch.setattr(fusion_guess, "LISTED_SHARE", 1.0)
    merge = Merge(params={"quantile": 0.4})
    base, one, other = merge.values
    rng = np.random.default_rng(5)
    for row in range(0, SHAPE[0], 2):
        base[row] = 0
        one[row], other[row] = 0.0995, 0.25
        one[row, rng.integers(SHAPE[1])] = 0
        other[row, rng.integers(SHAPE[1], size=3)] = 0
    merge.encode()
    sure, _ = merge.run(merge.job, "stored")
    window = fusion_guess._window
    monkeypatch.setattr(
        fusion_guess, "_window", lambda *how: (found := window(*how)) and (found[0], found[1] + (4000 << 16))
    )
    found, made = merge.run(merge.roomy, way)
    assert made == GUESSED
    agree(found, sure)
    delta = (one - base).astype("f8")
    assert sure["kept_norms"][0] == pytest.approx(1, abs=0.01)
    assert sure["_energy_0"][0] == pytest.approx((delta**2).sum())


def test_windows_are_wider_where_rows_are_unlike_each_other() -> None:
    widths = []
    for spread in (0.0, 0.1, 0.3):
        merge = Merge(spread=spread)
        sample, *_ = merge.method.reductions(merge.roomy)
        total = Accumulator(np.zeros(sample.shapes(merge.roomy)[0] or (), np.int64))
        for tile in merge.tiles():
            sample.update(merge.roomy, {}, total, tile)
        low, high = sample.combine(merge.roomy, {}, total)[WINDOW][0]
        widths.append(high - low >> 16)
    assert 2 * widths[0] < widths[1] < widths[2], widths


# -- what is added up


@given(
    st.lists(st.tuples(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 1000)), max_size=9)
)
def test_squares_add_up_in_any_order(parts: list[tuple[float, int]]) -> None:
    """Within a rounding of each, as rational numbers have it; float32 numbers of any size."""
    found, turned = np.zeros(squares.SQUARES, np.int64), np.zeros(squares.SQUARES, np.int64)
    for delta, times in parts:
        squares.add_square(np.float32(delta), times, found)
    for delta, times in reversed(parts):
        for part in (1, times - 1):
            squares.add_square(np.float32(-delta), part, turned)
    np.testing.assert_array_equal(found, turned)
    exact = float(sum(Fraction(delta) ** 2 * times for delta, times in parts))
    assert squares.sum_squares(found) == pytest.approx(exact, rel=2**-30, abs=0)


@given(
    hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-2, 2, width=32)),
    st.sampled_from([0.0, 1e-300, 1e-13, 1e-7, 1e-4, 0.5, 1e200]),
    st.integers(0, 200),
    st.sampled_from([1, 3, 65536]),
)
def test_squares_of_a_row_add_up_by_any_pieces(deltas: Array, divergence: float, cut: int, times: int) -> None:
    """However large they are beside what the divergence of the row says of them; `cut` of them are not above."""
    most = squares.grid_of(divergence)[3]
    if 0 < most < 1e30:
        deltas = np.append(deltas, np.nextafter(np.float32(most), np.float32(0)))
    keys = np.arange(deltas.size, dtype=np.int32)
    whole, parts = np.zeros((2, squares.SQUARES), np.int64)
    squares.squares_above(deltas, keys, np.int32(cut - 1), divergence, float(abs(deltas).max()), whole)
    for piece in np.split(np.arange(cut, deltas.size), [7]) if cut < deltas.size else []:
        reach = float(abs(deltas[piece]).max(initial=0))
        squares.squares_above(deltas[piece], keys[piece], np.int32(-1), divergence, reach, parts)
    exact = float(sum(Fraction(float(delta)) ** 2 for delta in deltas[cut:]))
    found = squares.sum_squares(whole)
    assert found == squares.sum_squares(parts), "pieces"
    one_by_one = np.zeros(squares.SQUARES, np.int64)
    for delta in deltas[cut:]:
        squares.add_square_of_row(delta, times, divergence, one_by_one)
    assert squares.sum_squares(one_by_one) == pytest.approx(times * found, rel=1e-15)
    assert found == pytest.approx(exact, rel=2**-30, abs=deltas.size * 2 * divergence * 2**-30)


def test_squares_beyond_all_bounds() -> None:
    found = np.zeros(squares.SQUARES, np.int64)
    squares.add_square(1e200, 1, found)
    assert squares.sum_squares(found) == math.inf
    many = np.zeros(squares.SQUARES, np.int64)
    squares.add_square(1e154, 100, many)
    assert squares.sum_squares(many) == math.inf, "each is finite, their sum is not"
    tiny = np.zeros(squares.SQUARES, np.int64)
    squares.add_square(1e-155, 3, tiny)
    assert squares.sum_squares(tiny) == pytest.approx(3e-310, rel=1e-3)
    assert squares.sum_squares(np.zeros(squares.SQUARES, np.int64)) == 0


magnitudes = st.one_of(
    st.integers(0, 60).map(lambda top: 0x3A80 + top << 16), st.integers(0x3A80_0000, 0x3AC0_0000), st.just(0)
)


@given(hnp.arrays(np.int32, st.integers(0, 300), elements=magnitudes), st.integers(0, 3))
def test_a_packed_list_holds_what_it_held(bits: npt.NDArray[np.int32], cut: int) -> None:
    each = np.array([len(bits) * cut // 3, len(bits) - len(bits) * cut // 3])
    values, listed = bits.view(np.float32).copy(), np.empty((2, 2))
    size = score_lists.pack_rows(values, each, listed)
    assert size <= len(bits)
    at = 0
    for row, part in enumerate(np.split(bits.view(np.float32), each[:1])):
        single, many = listed[:, row].astype(int)
        held = Counter(values[at : at + single].tolist())
        pairs = values[at + single : at + single + 2 * many].reshape(-1, 2)
        held.update({value: int(times) for value, times in pairs.tolist()})
        assert held == Counter(part.tolist())
        at += single + 2 * many
    assert at == size


def test_a_list_takes_runs_and_gives_its_room_back() -> None:
    room = Room(10)
    one, other = Listed(8, room), Listed(8, room)
    runs = [np.arange(size, dtype=np.float32) for size in (5, 3, 1)]
    assert one.put(runs[0]) == 0
    assert other.put(runs[0]) == 0
    assert other.put(runs[1]) == -1, "that of others is taken"
    assert other.put(runs[2]) == -1, "it is of no use any more, and holds no room"
    assert one.put(runs[1]) == 5
    assert one.put(runs[2]) == -1, "its own is taken"
    np.testing.assert_array_equal(one.values, [0, 1, 2, 3, 4, 0, 1, 2])
    for each in (one, other):
        each.close()
    assert room.take(10)
    assert not room.take(1)


def test_what_is_found_of_a_guess_is_kept_nowhere() -> None:
    assert not lasting({name: np.zeros(1) for name in (WINDOW, MOVED, fusion_guess.SAMPLE)})


def reference_window(values: list[Array], quantile: float) -> Array:
    """Scores of a float64 reference, sorted."""
    a, b = (value.astype("f8") for value in values)
    delta = b - a
    p = np.exp(a)
    p /= p.sum(axis=1, keepdims=True)
    apart = delta - delta.mean(axis=1, keepdims=True)
    z = (p * np.expm1(apart)).sum(axis=1, keepdims=True)
    q = p * np.exp(apart) / (1 + z)
    kl = (q * apart).sum(axis=1, keepdims=True) - np.log1p(z)
    found = np.sort((abs(delta) * kl).ravel())
    return found[[int(quantile * found.size)]]


def test_the_threshold_is_that_of_a_reference() -> None:
    merge = Merge()
    found, made = merge.run(merge.roomy, "stored")
    assert made == GUESSED
    for j in range(2):
        expected = reference_window([merge.values[0], merge.values[j + 1]], 0.9)
        assert found["thresholds"][j] == pytest.approx(expected[0], rel=2e-7)
