"""Order statistics against a sort, whatever the values, the cut and the order of work."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mergepipe.tasks.method import Accumulator, Array, State, Tile
from mergepipe.tasks.select import Coarse, refinements, selected, start_selection
from support.drive import make_job


def find(values: Array, ranks: Array, cuts: list[int], workers: int = 1) -> tuple[Array, State]:
    """Follow `ranks` through tensors of shape (models, n), cut at `cuts`."""
    _, job = make_job("task_arithmetic", (values.shape[1],), values.dtype, [{"weight": 1}] * len(values))
    state: State = {}
    for sweep in (
        Coarse(False, lambda job, state: start_selection("s", ranks, state["histogram"])),
        *refinements(job, "s", ranks.shape[1], lambda job, state: {}),
    ):
        if not sweep.needed(job, state):
            continue
        counts, _ = sweep.shapes(job)
        assert counts is not None
        each = [Accumulator(np.zeros(counts, np.int64)) for _ in range(workers)]
        edges = [0, *sorted(c for c in cuts if c < values.shape[1]), values.shape[1]]
        for i, (start, stop) in enumerate(pairwise(edges)):
            tile = Tile(i, start, None, np.ascontiguousarray(values[:, start:stop]), values[:0])
            sweep.update(job, state, each[i % workers], tile)
        total = np.sum([a.counts for a in each], axis=0, dtype=np.int64)
        state |= sweep.combine(job, state, Accumulator(total))
    return selected(job, state, "s"), state


@given(data=st.data(), work=st.sampled_from(["f4", "f8"]), few=st.booleans())
def test_equals_a_sort(data: Any, work: str, few: bool) -> None:
    n = data.draw(st.integers(1, 300))
    floats = st.floats(allow_nan=False, allow_infinity=False, width=32 if work == "f4" else 64)
    elements = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5]) if few else floats
    values = data.draw(hnp.arrays(work, (2, n), elements=elements))
    ranks = np.array(
        data.draw(st.lists(st.lists(st.integers(-1, n - 1), min_size=3, max_size=3), min_size=2, max_size=2))
    )
    cuts = data.draw(st.lists(st.integers(1, n), max_size=4))
    found, state = find(values, ranks, cuts, workers=data.draw(st.integers(1, 3)))
    ordered = np.sort(np.abs(values), axis=1).astype(np.float64)
    for k in range(2):
        for r in range(3):
            rank = ranks[k, r]
            if rank < 0:
                assert np.isnan(found[k, r])
                continue
            assert found[k, r] == ordered[k, rank]
            if "_s_equal" in state:
                assert state["_s_equal"][k, r] == (ordered[k] == ordered[k, rank]).sum()
                assert state["_s_rank"][k, r] == rank - np.searchsorted(ordered[k], ordered[k, rank])


@pytest.mark.parametrize("work", ["f4", "f8"])
def test_histogram_holds_top_fifteen_bits(work: str) -> None:
    values = np.array([[0.0, -0.0, 1.0, -1.0, 1.001, 2.0]], work)
    _, state = find(values, np.array([[0]]), [])
    bins = np.abs(values[0]).view("i4" if work == "f4" else "i8") >> (16 if work == "f4" else 48)
    np.testing.assert_array_equal(state["histogram"][0], np.bincount(bins, minlength=32768))


@pytest.mark.parametrize("work", ["f4", "f8"])
def test_neighbouring_floats_are_told_apart(work: str) -> None:
    one = np.array(1, work)
    values = np.array(
        [[np.nextafter(one, 2), one, np.nextafter(one, 0), -np.finfo(work).max, np.finfo(work).tiny]], work
    )
    found, _ = find(values, np.array([[0, 1, 2, 3, 4]]), [2])
    np.testing.assert_array_equal(found, np.sort(np.abs(values)).astype(np.float64))
