"""Coordinate fusion from stored bits to stored bits gives the bits of the way by tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mergepipe.tasks import convert, scores
from mergepipe.tasks.blocks import block_bounds
from mergepipe.tasks.method import Accumulator, Job, MergeMethod, State, stored_sweep
from support.bits import as_bits, as_stored
from support.drive import load_tile, make_job

U16 = npt.NDArray[np.uint16]
Array = npt.NDArray[Any]

SHAPES = [(1,), (5000,), (1, 7), (200, 64), (97, 700), (130, 1536), (3, 50, 333), (9, 50_257)]


def drawn(shape: tuple[int, ...], donors: int, seed: int = 0) -> list[U16]:
    """A primary and donors: rows that are close and far, rows and elements that are equal, zeros, subnormals."""
    rng = np.random.default_rng(seed)
    primary = rng.normal(0, 0.02, shape).astype("f4").reshape(-1, shape[-1])
    primary[rng.random(primary.shape) < 0.05] = 0
    primary[rng.random(primary.shape) < 0.02] = 1e-39
    primary[3::7, 0] = 1.5
    found = [primary]
    for donor in range(donors):
        step = rng.choice([0.0, 1e-3, 1e-3, 0.05, 1.5], (len(primary), 1))
        moved = primary + step * rng.normal(size=primary.shape) * (rng.random(primary.shape) < 0.9)
        moved[donor :: donors + 3] = primary[donor :: donors + 3] + np.float32(0.25)
        found.append(moved.astype("f4"))
    return [as_bits(values).reshape(-1) for values in found]


def cut(blocks: int) -> list[tuple[int, int]]:
    """Units of one, two, three, ... blocks."""
    found, first = [], 0
    while first < blocks:
        found.append((first, min(first + len(found) + 1, blocks)))
        first = found[-1][1]
    return found


class Merge:
    """One tensor, either way."""

    def __init__(self, shape: tuple[int, ...], donors: int, name: str, params: Mapping[str, Any]) -> None:
        self.bits = drawn(shape, donors)
        self.decode()
        self.method: MergeMethod
        self.job: Job
        self.method, self.job = make_job(name, shape, "f4", [{}] * donors, params)

    def decode(self) -> None:
        """The values of what is stored now."""
        self.values = [np.empty(bits.size, "f4") for bits in self.bits]
        for bits, out in zip(self.bits, self.values, strict=True):
            convert.decode(bits, "BF16", out)

    def stored(self, blocks: tuple[int, int]) -> list[U16]:
        """What is stored of them."""
        return [as_stored(bits[self.of(blocks)]) for bits in self.bits]

    def of(self, blocks: tuple[int, int]) -> slice:
        return slice(block_bounds(self.job.shape, blocks[0])[0], block_bounds(self.job.shape, blocks[1] - 1)[1])

    def sweeps(self) -> tuple[State, list[str]]:
        """The state, by tiles, and which sweeps gave the same from stored bits."""
        state: State = {}
        by_bits = []
        for sweep in self.method.reductions(self.job):
            if not sweep.needed(self.job, state):
                continue
            made, found = self.room(sweep), self.room(sweep)
            for index in range(self.job.blocks):
                sweep.update(self.job, state, made, self.tile(index))
            body = stored_sweep(sweep, self.job, state)
            if body is not None:
                by_bits.append(sweep.name)
                for blocks in cut(self.job.blocks):
                    assert body(self.stored(blocks), found, blocks)
                for one, other in ((made.counts, found.counts), (made.blocks, found.blocks)):
                    np.testing.assert_array_equal(one, other)
            state |= sweep.combine(self.job, state, made)
        return state, by_bits

    def room(self, sweep: Any) -> Accumulator:
        counts, row = sweep.shapes(self.job)
        blocks = None if row is None else np.zeros((self.job.blocks, *row))
        return Accumulator(None if counts is None else np.zeros(counts, np.int64), blocks)

    def tile(self, index: int) -> Any:
        return load_tile(self.method, self.job, self.values[1:], self.values[0], index)

    def outputs(self, state: State) -> tuple[U16, U16 | None]:
        """By tiles, and from stored bits if that can be."""
        made, found = np.zeros(self.job.size, np.uint16), np.zeros(self.job.size, np.uint16)
        for index in range(self.job.blocks):
            part, tile = self.of((index, index + 1)), self.tile(index)
            out = np.empty(tile.values.shape[1], "f4")
            self.method.kernel(self.job, state, tile, out)
            convert.encode(out, "BF16", made[part])
        body = self.method.stored(self.job, state)
        for blocks in cut(self.job.blocks):
            if body is not None:
                assert body(self.stored(blocks), found[self.of(blocks)], blocks)
        return made, None if body is None else found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("donors", [1, 3])
@pytest.mark.parametrize(
    "params", [{}, {"zero_kl": "abs", "direction": "sym"}, {"scale": 0.5, "quantile": 0.3}, {"direction": "forward"}]
)
def test_stored_bits_and_tiles_agree(shape: tuple[int, ...], donors: int, params: dict[str, Any]) -> None:
    merge = Merge(shape, donors, "scf_rkl", params)
    state, by_bits = merge.sweeps()
    assert len(by_bits) == (0 if shape == (1,) and "zero_kl" not in params else 2)
    made, found = merge.outputs(state)
    assert (found is None) == (not by_bits)
    if found is not None:
        np.testing.assert_array_equal(found, made)
        assert (made != merge.bits[0]).any() or merge.job.size == 1


@pytest.mark.parametrize(
    ("name", "donors", "params", "by_bits", "kernel"),
    [
        ("scf_rkl", 1, {"tie_rule": "index"}, 1, True),
        ("scf_rkl", 2, {"multi": "fold"}, 2, False),
        ("scf_rkl", 2, {"importance": "pointwise"}, 0, False),
        ("scf_rkl", 2, {"threshold": "iqr"}, 1, True),
        ("arcee_fusion", 1, {}, 1, True),
    ],
)
def test_what_has_no_way_of_its_own_goes_by_tiles(
    name: str, donors: int, params: dict[str, Any], by_bits: int, kernel: bool
) -> None:
    merge = Merge((97, 700), donors, name, params)
    state, swept = merge.sweeps()
    assert len(swept) == by_bits
    made, found = merge.outputs(state)
    assert (found is not None) == (kernel and "_ties_0" not in state)
    if found is not None:
        np.testing.assert_array_equal(found, made)


def test_an_excluded_tensor_has_no_way_of_its_own() -> None:
    merge = Merge((20, 64), 1, "scf_rkl", {"exclude": ("layer",)})
    assert merge.method.stored(merge.job, {}) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 9000, 64 * 199])
@pytest.mark.parametrize("model", [0, 2])
def test_what_is_not_finite_is_not_done(bad: float, place: int, model: int) -> None:
    merge = Merge((200, 64), 2, "scf_rkl", {})
    state, _ = merge.sweeps()
    merge.bits[model][place] = as_bits([bad])[0]
    known: State = {}
    every = 0, merge.job.blocks
    for sweep in merge.method.reductions(merge.job)[:2]:
        body = stored_sweep(sweep, merge.job, known)
        assert body is not None
        assert not body(merge.stored(every), merge.room(sweep), every)
        known = state | {"_scores_0_found": state["_scores_0_found"] >> 16}
    body_of_kernel = merge.method.stored(merge.job, state)
    assert body_of_kernel is not None
    assert not body_of_kernel(merge.stored(every), np.empty(merge.job.size, np.uint16), every)


def test_what_does_not_fit_is_not_done() -> None:
    """The largest of float32 that rounds to an infinity, half way between two that do not."""
    a, b = (as_stored(np.full(64, bits, np.uint16)) for bits in (0x7F7F, 0xFF7F))
    found, least = np.ones((1, 1, 1)), np.zeros(1, np.float32)
    out = np.empty(64, np.uint16)
    assert scores.take_stored(a, (b,), 64, found, False, least, 0.25, out) is False
    assert scores.take_stored(a, (b,), 64, found, False, least, None, out) is True


def equal_scores(merge: Merge, size: int) -> None:
    """Half a row moved by the same step up, half down: all scores of rows that are alike are equal."""
    rows = np.zeros((size // 64, 64), "f4")
    rows[:, ::2], rows[:, 1::2] = 0.25, -0.25
    merge.bits[1] = as_bits(rows).reshape(-1)


def zero_scores(merge: Merge, size: int) -> None:
    """All rows moved as a whole."""
    merge.bits[1] = as_bits(np.full(size, 0.25, "f4"))


def late_ties(merge: Merge, size: int) -> None:
    """Two scores, and a threshold that is the lower one."""
    rows = np.zeros((size // 64, 64), "f4")
    rows[:, ::2], rows[:, 1::2], rows[::2] = 0.25, -0.25, 2 * rows[::2]
    rows[::3] = 0
    merge.bits[1] = as_bits(rows).reshape(-1)


def overflowing(merge: Merge, size: int) -> None:
    """Differences beyond float32 in some rows, whose divergence is 0 then."""
    merge.bits[0][:64], merge.bits[1][:64], merge.bits[1][5] = 0x7F7F, 0xFF7F, 0x7F7F


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.5, 0.99])
@pytest.mark.parametrize("zero_kl", ["skip", "abs"])
@pytest.mark.parametrize("change", [equal_scores, zero_scores, late_ties, overflowing])
def test_scores_that_are_equal_zero_or_infinite(
    change: Callable[[Merge, int], None], zero_kl: str, quantile: float
) -> None:
    merge = Merge((300, 64), 1, "scf_rkl", {"quantile": quantile, "zero_kl": zero_kl})
    if change is not overflowing:
        merge.bits[0][:] = 0
    change(merge, merge.job.size)
    merge.decode()
    state, by_bits = merge.sweeps()
    assert len(by_bits) == 2
    made, found = merge.outputs(state)
    np.testing.assert_array_equal(found, made)


@pytest.mark.parametrize("donors", [scores.AT_ONCE, scores.AT_ONCE + 1])
def test_many_donors(donors: int) -> None:
    merge = Merge((70, 96), donors, "scf_rkl", {"quantile": 0.5})
    state, by_bits = merge.sweeps()
    assert len(by_bits) == 2
    made, found = merge.outputs(state)
    assert (found is None) == (donors > scores.AT_ONCE)
    if found is not None:
        np.testing.assert_array_equal(found, made)


@given(st.floats(), st.floats(width=32))
@example(3.402823364973241e38, math.inf)  # infinity is next in float32
def test_what_reaches_a_threshold_reaches_it_rounded_up(threshold: float, score: float) -> None:
    least = scores.rounded_up(np.array([threshold]))
    assert least.dtype == np.float32
    assert (np.float32(score) >= least[0]) == (score >= threshold)
