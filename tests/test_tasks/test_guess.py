"""A guess is never believed unless it is right, and is right where the sample says enough."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergepipe.tasks import convert, fused_counts, guess, windows
from mergepipe.tasks.breadcrumbs import kept_ranks
from mergepipe.tasks.method import Accumulator, Array, Job, Reduction, State, Tile, expected_reads
from mergepipe.tasks.registry import SPARSIFIERS
from support.bits import as_stored
from support.drive import make_job

SIZE = 1 << 20
U16 = npt.NDArray[np.uint16]


def bits(values: Array) -> U16:
    out = np.empty(values.size, np.uint16)
    convert.encode(values.astype(np.float32), "BF16", out)
    return out


def fine_tunes(size: int = SIZE, models: int = 2) -> list[U16]:
    return [stream.copy() for stream in drawn(size, models)]


@cache
def drawn(size: int, models: int) -> list[U16]:
    rng = np.random.default_rng(0)
    base = rng.standard_normal(size, np.float32) * np.float32(0.02)
    return [bits(base), *(bits(base + rng.standard_normal(size, np.float32) / 1000) for _ in range(models))]


def job_of(size: int, densities: list[float], tie_rule: str = "keep") -> Job:
    each = [{"weight": 1.0, "density": density, "tie_rule": tie_rule} for density in densities]
    return replace(make_job("ties", (size,), np.float32, each)[1], halves=True)


def crumbs_of(size: int, kept: list[tuple[float, float]]) -> Job:
    """Densities and gammas."""
    each = [{"weight": 1.0, "density": density, "gamma": gamma} for density, gamma in kept]
    return replace(make_job("breadcrumbs", (size,), np.float32, each)[1], halves=True)


def deltas(streams: list[U16]) -> Array:
    below, values = np.empty(streams[0].size, np.float32), np.empty((len(streams) - 1, streams[0].size), np.float32)
    convert.decode(streams[0], "BF16", below)
    for row, out in zip(streams[1:], values, strict=True):
        convert.decode_delta(row, "BF16", below, out)
    return values


def run(job: Job, streams: list[U16], cuts: list[int], stored: bool = True, every: int = 0) -> tuple[State, list[str]]:
    """All sweeps of the trim, over units of whole blocks; the state, and which sweeps were made.

    With `every` the tensor can't be held: one block in so many is its sample.
    """
    state: State = {}
    made: list[str] = []
    for sweep in SPARSIFIERS[job.sparsify].reductions(job):
        if not sweep.needed(job, state):
            continue
        made.append(sweep.name)
        counts, row = sweep.shapes(job)
        total = Accumulator(
            None if counts is None else np.zeros(counts, np.int64),
            None if row is None else np.zeros((job.blocks, *row)),
        )
        units = list(pairwise([0, *cuts, job.size]))
        if every and sweep.name == "sample":
            units = [(start, start + 65536) for start in range(0, job.size, every * 65536)]
        for start, stop in units:
            one(sweep, job, state, [as_stored(stream[start:stop]) for stream in streams], start, total, stored)
        state |= sweep.combine(job, state, total)
    return state, made


def one(
    sweep: Reduction, job: Job, state: State, streams: list[U16], start: int, total: Accumulator, stored: bool
) -> None:
    body = getattr(sweep, "stored", None)
    if stored and body is not None and total.counts is not None:
        mine = Accumulator(np.zeros_like(total.counts), total.blocks)
        first = start // 65536
        assert body(job, state)(streams, mine, (first, first + -(-streams[0].size // 65536)))
        total.counts += mine.counted
        return
    values = deltas(streams)
    for at in range(0, values.shape[1], 65536):
        piece = np.ascontiguousarray(values[:, at : at + 65536])
        sweep.update(job, state, total, Tile((start + at) // 65536, start + at, None, piece, piece[:0]))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("densities", [[0.2, 0.5], [0.01, 1.0], [0.99, 0.0]])
def test_a_guess_finds_the_exact_threshold(densities: list[float], stored: bool) -> None:
    streams, job = fine_tunes(), job_of(SIZE, densities)
    state, made = run(job, streams, [65536, 4 * 65536], stored)
    assert made == ["sample", "counts near thresholds"], "the sure way was not needed"
    sure, _ = run(replace(job, halves=False), streams, [])
    for name in ("thresholds", "densities", "_stay", "_factors"):
        np.testing.assert_array_equal(state[name], sure[name])
    ordered = np.sort(np.abs(deltas(streams)), axis=1)
    for k, density in enumerate(densities):
        if 0 < density < 1:
            assert state["thresholds"][k] == ordered[k, SIZE - int(density * SIZE)]


def unlike(spread: float, seed: int) -> list[U16]:
    """Rows of a quarter of a block, 4 Mi elements of each model, that have moved more and less."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((256, 16384), np.float32) * np.float32(0.02)
    moves = [np.exp(rng.standard_normal((256, 1)) * spread) * rng.standard_normal(base.shape) / 1000 for _ in range(2)]
    return [bits(base.ravel()), *(bits((base + move).ravel()) for move in moves)]


@pytest.mark.parametrize("stored", [True, False])
def test_windows_are_wider_where_blocks_are_unlike_each_other(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample of 16 blocks, whose quantiles may lie off by much more than chance alone would have it."""
    missed = 0
    for seed in range(3):
        streams, job = unlike(0.5, seed), job_of(1 << 22, [0.2, 0.5])
        state, made = run(job, streams, [1 << 20], stored, every=4)
        assert made == ["sample", "counts near thresholds"], "the sure way was not needed"
        sure, _ = run(replace(job, halves=False), streams, [])
        np.testing.assert_array_equal(state["thresholds"], sure["thresholds"])
        with monkeypatch.context() as patch:
            patch.setattr(guess, "UNLIKE", 0.0)
            missed += len(run(job, streams, [1 << 20], stored, every=4)[1]) > 2
    assert missed, "narrow ones would not have done"


def test_a_difference_beyond_float32_in_a_sample_is_no_guide() -> None:
    streams, job = unlike(0.1, 0), crumbs_of(1 << 22, [(0.5, 0.01), (0.2, 0.1)])
    streams[0][7], streams[1][7] = bits(np.array([3e38, -3e38]))
    with np.errstate(over="ignore"):
        state, made = run(job, streams, [1 << 20], stored=False, every=4)
        sure, _ = run(replace(job, halves=False), streams, [], stored=False)
    assert made[:2] == ["sample", "coarse histogram"]
    np.testing.assert_array_equal(state["thresholds"], sure["thresholds"])


@given(st.floats(1e-6, 1 - 1e-6))
def test_a_leverage_is_a_bound(share: float) -> None:
    """For numbers of a normal distribution and of Laplace's."""
    normal = NormalDist()
    deviations = normal.inv_cdf((1 + share) / 2)
    assert guess.leverage(share) >= 0.999 * 2 * deviations * normal.pdf(deviations)
    assert guess.leverage(share) >= 0.999 * -math.log1p(-share) * (1 - share)


def test_one_block_tells_nothing_of_the_others() -> None:
    streams, job = fine_tunes(), job_of(SIZE, [0.2, 0.5])
    assert run(job, streams, [], every=16)[1][:2] == ["sample", "coarse histogram"]
    # Where each block gives a part, one that is a unit by itself is no sample of the others.
    assert run(job, streams, [65536])[1] == ["sample", "counts near thresholds"]


@pytest.mark.parametrize("stored", [True, False])
def test_a_threshold_of_many_significant_bits(stored: bool) -> None:
    """Where a weight is near zero its difference has more of them, and is not its counter's first pattern."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal(SIZE, np.float32) * np.float32(0.02)
    base[rng.random(SIZE) < 1e-3] *= np.float32(1e-7)
    streams = [bits(base), bits(base + rng.standard_normal(SIZE, np.float32) / 1000)]
    keys = np.sort(np.abs(deltas(streams)[0]).view(np.int32))
    around = np.arange(SIZE // 2, SIZE * 9 // 10)
    fine = around[(keys[around] & 0xF) != 0]
    assert fine.size > 20
    for rank in fine[::20]:
        job = job_of(SIZE, [float((SIZE - rank) / SIZE)])
        state, made = run(job, streams, [65536], stored)
        assert state["thresholds"][0] == keys[rank : rank + 1].view(np.float32)[0]
        assert made == ["sample", "counts near thresholds"], "the sure way was not needed"
        sure, _ = run(replace(job, halves=False), streams, [])
        np.testing.assert_array_equal(state["densities"], sure["densities"])


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("off", [-0.03, 0.03])
def test_one_more_sweep_where_a_rank_lies_beside_its_window(
    off: float, stored: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows that are too low or too high."""
    guessed = guess._windows
    monkeypatch.setattr(guess, "SPREAD", 0.0)

    def too_far(counts: Array, spans: Array, size: int, wider: Array) -> tuple[Array, Array] | None:
        return guessed(counts, spans + off * size, size, wider)

    monkeypatch.setattr(guess, "_windows", too_far)
    again = ["sample", "counts near thresholds", "counts where they were missed"]
    for job in (job_of(SIZE, [0.2, 0.5]), crumbs_of(SIZE, [(0.2, 0.05), (0.5, 0.1)])):
        streams = fine_tunes()
        state, made = run(job, streams, [65536], stored)
        sure, _ = run(replace(job, halves=False), streams, [])
        np.testing.assert_array_equal(state["thresholds"], sure["thresholds"])
        assert made == again, "the sure way was not needed"


def test_ties_are_counted_as_on_the_sure_way() -> None:
    streams, job = fine_tunes(), job_of(SIZE, [0.2, 0.3], "index")
    state, made = run(job, streams, [65536])
    assert made == ["sample", "counts near thresholds", "ties"]
    sure, _ = run(replace(job, halves=False), streams, [])
    np.testing.assert_array_equal(state["_ties_before"], sure["_ties_before"])
    np.testing.assert_array_equal(state["densities"], sure["densities"])


def test_a_sample_that_misleads_costs_one_more_sweep() -> None:
    """Strips whose sampled piece is much larger than the rest."""
    streams, job = fine_tunes(), job_of(SIZE, [0.2, 0.2])
    taken = np.zeros((1, 32768), np.int64)
    rows = [row.copy() for row in streams[1:]]
    for strip in range(SIZE // fused_counts.STRIP):
        place = strip * fused_counts.STRIP + ((strip * 0x9E3779B1 & 0xFFFFFFFF) >> 29) * fused_counts.PIECE
        for row in rows:
            row[place : place + fused_counts.PIECE] = bits(np.linspace(1, 2, fused_counts.PIECE))
    assert fused_counts.sample_top(as_stored(streams[0]), (as_stored(rows[0]),), taken, np.empty(0))
    assert taken[0, :0x3F00].sum() == 0, "the sample sees the large ones only"
    state, made = run(job, [streams[0], *rows], [65536])
    assert made == ["sample", "counts near thresholds", "counts where they were missed"]
    sure, _ = run(replace(job, halves=False), [streams[0], *rows], [])
    np.testing.assert_array_equal(state["thresholds"], sure["thresholds"])


def test_a_counter_of_several_patterns_is_not_believed() -> None:
    """A wide window over numbers of many significant bits."""
    rng = np.random.default_rng(1)
    base = bits(rng.standard_normal(SIZE) * np.float32(1e-5))
    other = bits(np.where(rng.random(SIZE) < 0.5, 1.0, 1.5))
    job = job_of(SIZE, [0.5])
    state, made = run(job, [base, other], [])
    sure, _ = run(replace(job, halves=False), [base, other], [])
    np.testing.assert_array_equal(state["thresholds"], sure["thresholds"])
    assert made[0] == "sample"
    window = {"_near_low": np.array([[0x3F800000]]), "_near_shift": np.array([[6]]), "_near_sample": np.empty((1, 0))}
    near = guess.Near("s", lambda job: np.array([[SIZE // 3]]), lambda job, state: {"hit": np.ones(1)})
    counts = np.zeros((1, 1, windows.COUNTERS + 1), np.int64)
    values = np.abs(deltas([base, other]))
    near.update(job, window, Accumulator(counts), Tile(0, 0, None, values, np.empty((0, 0))))
    assert counts[..., -1] <= SIZE // 3 < counts[..., -1] + (counts[..., :-1] % fused_counts.ODD).sum(), (
        "it lies inside"
    )
    moved = near.combine(job, window, Accumulator(counts))
    assert moved["_near_shift"] == 0, "each pattern of that counter gets one of its own"
    again = np.zeros_like(counts)
    near.update(job, moved, Accumulator(again), Tile(0, 0, None, values, np.empty((0, 0))))
    found = near.combine(job, moved, Accumulator(again))
    assert found["_s_found"] == np.sort(values[0]).view(np.int32)[SIZE // 3]
    assert found["hit"] == 1


@pytest.mark.parametrize("change", [{"halves": False}, {"work": np.dtype(np.float64)}, {"shape": (1000, 1000)}])
def test_no_guess_where_it_would_not_pay(change: dict[str, object]) -> None:
    for job in (job_of(SIZE, [0.2]), crumbs_of(SIZE, [(0.2, 0.01)])):
        reductions = SPARSIFIERS[job.sparsify].reductions
        sure = reductions(replace(job, **change))  # type: ignore[arg-type]
        assert sure[0].name == "coarse histogram"
        assert expected_reads(sure, job) > expected_reads(reductions(job), job)


NONE, WHOLE, ONE, LARGEST = (0.0, 0.01), (1.0, 0.01), (1e-6, 0.3), (0.4, 0.0)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    "kept",
    [[(0.2, 0.01), (0.5, 0.1)], [WHOLE, (0.7, 0.05)], [(0.3, 0.3), NONE], [ONE, (0.001, 0.5)], [LARGEST, ONE]],
)
def test_two_ranks_of_a_model_are_guessed_together(kept: list[tuple[float, float]], stored: bool) -> None:
    """Of windows far apart, that overlap, and that are one."""
    streams, job = fine_tunes(), crumbs_of(SIZE, kept)
    state, made = run(job, streams, [65536, 4 * 65536], stored)
    assert made == ["sample", "counts near thresholds"], "the sure way was not needed"
    sure, ways = run(replace(job, halves=False), streams, [])
    assert ways == ["coarse histogram", "fine histogram 1 (breadcrumbs)"]
    for name in ("thresholds", "densities", "_uppers"):
        np.testing.assert_array_equal(state[name], sure[name])
    lows, ordered = state["_near_low"], np.sort(np.abs(deltas(streams)), axis=1)
    for k, (density, gamma) in enumerate(kept):
        if kept[k] in (NONE, WHOLE):
            assert (lows[k] == -1).all()
            continue
        first, last = kept_ranks(density, gamma, SIZE)
        assert (state["thresholds"][k], state["_uppers"][k]) == (ordered[k, first], ordered[k, last])
        if kept[k] == ONE:
            assert first == last
            assert lows[k, 0] == lows[k, 1]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]) | st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=3))
def test_two_ranks_of_a_model_are_those_of_the_sure_way(kept: list[tuple[float, float]]) -> None:
    """Whether a guess is made, is right, or is not."""
    streams, job = fine_tunes(SIZE + 1, 3)[: 1 + len(kept)], crumbs_of(SIZE + 1, kept)
    state, _ = run(job, streams, [SIZE // 2])
    sure, _ = run(replace(job, halves=False), streams, [])
    assert state.keys() >= {"thresholds", "_uppers"} or all(density == 1 for density, _ in kept)
    for name in state.keys() & {"thresholds", "densities", "_uppers"}:
        np.testing.assert_array_equal(state[name], sure[name])


def test_one_rank_that_is_missed_spoils_the_guess() -> None:
    """Elements so rare that the sample, of every eighth, saw none of them."""
    streams, job = fine_tunes(models=1), crumbs_of(SIZE, [(0.5, 0.0)])
    unseen = np.ones(SIZE, bool)
    for strip in range(SIZE // fused_counts.STRIP):
        place = strip * fused_counts.STRIP + ((strip * 0x9E3779B1 & 0xFFFFFFFF) >> 29) * fused_counts.PIECE
        unseen[place : place + fused_counts.PIECE] = False
    streams[1][np.flatnonzero(unseen)[-1]] = bits(np.array([1e30]))[0]
    state, made = run(job, streams, [])
    assert made == ["sample", "counts near thresholds", "coarse histogram", "fine histogram 1 (breadcrumbs)"]
    assert state["_uppers"][0] > 9e29


def test_no_guess_where_no_rank_is_wanted() -> None:
    job = crumbs_of(SIZE, [NONE, WHOLE])
    assert next(sweep.name for sweep in SPARSIFIERS["breadcrumbs"].reductions(job)) == "coarse histogram"
    state, _ = run(job, fine_tunes(), [])
    np.testing.assert_array_equal(state["thresholds"], [np.inf, 0])


def tadrop_of(size: int, each: list[dict[str, object]]) -> Job:
    models = [{"weight": 1.0}] * len(each)
    sparsify = [{"method": "tadrop", **params} for params in each]
    return replace(make_job("ties", (size,), np.float32, models, sparsify=sparsify)[1], halves=True)


FOUND = ("metric", "drop_rates", "thresholds", "densities", "_stay", "_factors")


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize(
    ("each", "rest"),
    [
        ([{}, {}], []),
        ([{"q_lo": 0.3, "s_slope": 2.0}, {"s_offset": 0.5, "tie_rule": "index"}], ["ties"]),
        ([{"drop": "random"}, {"s_slope": -1.0, "s_offset": 0.9}], []),
        ([{"exclude": ("layer",)}, {"q_hi": 0.99}], []),
        ([{"s_cap": 0.0}, {"q_lo": 0.95}], []),
    ],
)
def test_a_rank_that_follows_from_two_others(each: list[dict[str, object]], rest: list[str], stored: bool) -> None:
    """TADrop's quantiles say how many elements go: all in one sweep."""
    streams, job = fine_tunes(), tadrop_of(SIZE, each)
    state, made = run(job, streams, [65536, 4 * 65536], stored)
    assert made == ["sample", "counts near thresholds", *rest], "the sure way was not needed"
    sure, ways = run(replace(job, halves=False), streams, [])
    assert ways[:2] == ["coarse histogram", "fine histogram 1 (quantiles)"]
    for name in FOUND:
        np.testing.assert_array_equal(state[name], sure[name])


@settings(max_examples=25)
@given(st.floats(0, 0.95), st.floats(0.95, 1), st.floats(-0.5, 1), st.floats(-2, 2), st.sampled_from(["keep", "index"]))
def test_tadrop_finds_what_the_sure_way_finds(low: float, high: float, offset: float, slope: float, rule: str) -> None:
    """Whether a guess is made, is right, or is not."""
    params = {"q_lo": low, "q_hi": high, "s_offset": offset, "s_slope": slope, "tie_rule": rule}
    streams, job = fine_tunes(SIZE + 1, 3)[:3], tadrop_of(SIZE + 1, [params, {}])
    state, _ = run(job, streams, [SIZE // 2])
    sure, _ = run(replace(job, halves=False), streams, [])
    for name in FOUND:
        np.testing.assert_array_equal(state[name], sure[name])


def test_a_following_rank_that_is_missed_is_looked_for_again() -> None:
    """A sample that sees the quantiles, and of what lies between them too little."""
    streams, job = fine_tunes(), tadrop_of(SIZE, [{}, {}])
    sweeps = SPARSIFIERS["tadrop"].reductions(job)
    sample, near = sweeps[:2]
    assert isinstance(near, guess.Near)
    totals = {}
    state: State = {}
    for sweep in (sample, near):
        counts, row = sweep.shapes(job)
        assert counts is not None
        assert row is not None
        totals[sweep.name] = Accumulator(np.zeros(counts, np.int64), np.zeros((job.blocks, *row)))
        one(sweep, job, state, streams, 0, totals[sweep.name], stored=True)
        if sweep is sample:
            state |= sweep.combine(job, state, totals[sweep.name])
    assert "thresholds" in near.combine(job, state, totals[near.name])
    for gone in ("_near_low", "_near_shift"):
        assert state[gone].shape == (2, 3)
    away = {**state, "_near_low": state["_near_low"] + np.array([0, 0, 1 << 28])}
    before = totals[near.name]
    moved = Accumulator(np.zeros_like(before.counted), np.zeros_like(before.blocks))
    one(near, job, away, streams, 0, moved, stored=True)
    again = near.combine(job, away, moved)
    assert "thresholds" not in again
    state |= again
    found = Accumulator(np.zeros_like(before.counted), np.zeros_like(before.blocks))
    one(sweeps[2], job, state, streams, 0, found, stored=True)
    sure, _ = run(replace(job, halves=False), streams, [])
    np.testing.assert_array_equal(sweeps[2].combine(job, state, found)["thresholds"], sure["thresholds"])


@pytest.mark.parametrize("params", [{"metric": "l1l2"}, {"rescale": "l2"}, {"target_density": 0.3}])
def test_no_guess_where_tadrop_has_to_know_more(params: dict[str, object]) -> None:
    sweeps = SPARSIFIERS["tadrop"].reductions(tadrop_of(SIZE, [params, {}]))
    assert sweeps[0].name == "coarse histogram"
