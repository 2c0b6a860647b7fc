"""Every statistic of `stability`, recomputed by hand on sequences that are written down here."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.pipeline.stability import (
    distinct_rate,
    divergences,
    entropies,
    has_loop,
    loop_rate,
    ngrams,
    rank_correlation,
    repeated_rate,
    token_entropy,
)

LOOPING = [8, 9, 1, 2, 3, 1, 2, 3, 1, 2, 3]
"""Two tokens, then a block of three, three times: bigrams 89 91 12 23 31 12 23 31 12 23."""

FRESH = [1, 2, 3, 4, 5]
sequences = st.lists(st.integers(0, 3), max_size=30)


def test_repeated_bigrams_by_hand() -> None:
    assert repeated_rate([LOOPING], 2) == 1 - 5 / 10
    assert repeated_rate([FRESH], 2) == 0
    assert repeated_rate([LOOPING, FRESH], 2) == (0.5 + 0) / 2
    assert repeated_rate([LOOPING, [7]], 2) == 0.5, "a continuation without a bigram has no rate"
    assert repeated_rate([[7]], 2) is None
    assert repeated_rate([LOOPING], 4) == 1 - 5 / 8  # 8912 9123 1231 2312 3123 1231 2312 3123


def test_distinct_bigrams_by_hand() -> None:
    assert distinct_rate([LOOPING, FRESH], 2) == (5 + 2) / (10 + 4)  # 34 and 45 are new
    assert distinct_rate([LOOPING, FRESH], 1) == 7 / 16
    assert distinct_rate([[1]], 2) is None


def test_loops_by_hand() -> None:
    assert has_loop(LOOPING, repeats=3, span=9)
    assert not has_loop(LOOPING, repeats=3, span=10)
    assert not has_loop(LOOPING[:-1], repeats=3, span=8)
    assert has_loop(LOOPING[:-1], repeats=2, span=8), "a block may be cut at the end once it has been repeated"
    assert has_loop([*LOOPING, 5, 6], repeats=3, span=9), "a loop that was left is one all the same"
    assert has_loop([4, 4, 4, 4], repeats=3, span=4)
    assert not has_loop([4, 4, 4], repeats=3, span=4)
    assert loop_rate([LOOPING, FRESH, []], repeats=3, span=9) == 1 / 3
    assert loop_rate([], repeats=3, span=9) == 0


@given(sequences, st.integers(2, 4), st.integers(2, 8))
def test_loops_are_what_their_definition_says(tokens: list[int], repeats: int, span: int) -> None:
    def is_loop(part: list[int], period: int) -> bool:
        return all(part[i] == part[i - period] for i in range(period, len(part)))

    expected = any(
        is_loop(tokens[start : start + max(repeats * period, span)], period)
        for period in range(1, len(tokens) // repeats + 1)
        for start in range(len(tokens) - max(repeats * period, span) + 1)
    )
    assert has_loop(tokens, repeats, span) == expected


@given(st.lists(sequences, min_size=1, max_size=4), st.integers(1, 5))
def test_rates_are_shares(continuations: list[list[int]], n: int) -> None:
    for rate in (repeated_rate(continuations, n), distinct_rate(continuations, n)):
        assert rate is None or 0 <= rate <= 1
    assert (repeated_rate(continuations, n) is None) == all(len(tokens) < n for tokens in continuations)
    if len(continuations) == 1 and len(continuations[0]) >= n:
        repeated, distinct = repeated_rate(continuations, n), distinct_rate(continuations, n)
        assert repeated is not None
        assert distinct == pytest.approx(1 - repeated)


def test_ngrams_are_in_order() -> None:
    assert ngrams(FRESH, 4) == [(1, 2, 3, 4), (2, 3, 4, 5)]
    assert ngrams(FRESH, 6) == []


def test_token_entropy_by_hand() -> None:
    assert token_entropy([[1, 1], [1, 2]]) == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4), abs=1e-15)
    assert token_entropy([[3, 3, 3]]) == 0
    assert token_entropy([[]]) is None


def test_entropy_by_hand() -> None:
    logits = np.log([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]) + np.array([[7], [-3]])
    expected = [1.5 * math.log(2), -0.8 * math.log(0.8) - 0.2 * math.log(0.1)]
    np.testing.assert_allclose(entropies(logits), expected, rtol=1e-12)
    np.testing.assert_array_equal(entropies(np.array([[0.0, -np.inf]])), [0])


def test_divergence_by_hand() -> None:
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    forward = 0.5 * math.log(2) + 0.25 * math.log(1 / 2)
    np.testing.assert_allclose(divergences(np.log([p]) + 3, np.log([q])), [forward], rtol=1e-12)
    sure = np.array([[0.0, -np.inf]])
    np.testing.assert_allclose(divergences(sure, np.zeros((1, 2))), [math.log(2)], rtol=1e-12)
    assert divergences(np.zeros((1, 2)), sure)[0] == np.inf
    np.testing.assert_array_equal(divergences(sure, sure), [0])


def test_logits_that_are_no_distribution_are_refused() -> None:
    for bad in (np.nan, np.inf):
        with pytest.raises(ValueError, match="not finite"):
            entropies(np.array([[0.0, bad]]))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rank_correlation_is_that_of_scipy(pairs: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert rank_correlation(x, y) is None
    else:
        assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_rank_correlation_by_hand() -> None:
    for order in itertools.permutations(range(4)):
        squares = sum((a - b) ** 2 for a, b in zip(range(4), order, strict=True))
        assert rank_correlation(range(4), order) == pytest.approx(1 - 6 * squares / (4 * 15))
