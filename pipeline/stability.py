"""How stable what a language model writes is: statistics of token sequences and of next-token distributions.

Everything here is a function of numbers that can be written down by hand; what makes the numbers, a model that writes
and reads, is :mod:`~mergepipe.pipeline.generation`, and :mod:`~mergepipe.pipeline.stability_report` puts both together.
A *continuation* is the tokens that a model wrote after a prompt, without the prompt and without the end token.

=====================  ================================================================================================
repeated n-gram rate   of one continuation ``1 - distinct n-grams / n-grams``; the mean over all continuations of at
                       least n tokens
loop rate              share of the continuations that hold a *loop*: one block of tokens, `repeats` times or more
                       back to back, over `span` tokens or more
distinct-n             distinct n-grams of all continuations together, over all their n-grams
entropy                of the distributions that the tokens were drawn from (before temperature), in nats; the mean over
                       all tokens of all continuations
token entropy          of the frequencies of the tokens in all continuations together, in nats
KL(p || q)             ``sum(p * log(p / q))`` over the vocabulary at one position, in nats; the mean over positions
=====================  ================================================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


def ngrams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of `n` neighbouring tokens, from left to right; none if there are fewer tokens.

    Examples
    --------
    >>> ngrams([5, 6, 5, 6], 2)
    [(5, 6), (6, 5), (5, 6)]
    """
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def repeated_rate(continuations: Sequence[Sequence[int]], n: int) -> float | None:
    """Mean share of a continuation's n-grams that stood in it before; None if none is as long as `n`.

    References
    ----------
    Welleck et al. 2020, Neural Text Generation with Unlikelihood Training, arXiv:1908.04319: "seq-rep-n".

    Examples
    --------
    >>> repeated_rate([[1, 2, 1, 2, 1, 2], [1, 2, 3], [4]], 2)  # 3 of 5 repeat, 0 of 2, nothing to count
    0.3
    """
    rates = [1 - len(set(found)) / len(found) for tokens in continuations if (found := ngrams(tokens, n))]
    return math.fsum(rates) / len(rates) if rates else None


def has_loop(tokens: Sequence[int], repeats: int, span: int) -> bool:
    """Whether one block of tokens stands `repeats` times or more back to back, over `span` tokens or more.

    A block of p tokens that goes on for m tokens is a run of ``m - p`` places that equal the one p before them.

    Parameters
    ----------
    tokens : sequence of int
    repeats : int
        2 or more.
    span : int
        So that three equal characters in a row need not be a loop.

    Examples
    --------
    >>> has_loop([9, 1, 2, 1, 2, 1, 2], repeats=3, span=6), has_loop([9, 1, 2, 1, 2, 1], repeats=3, span=5)
    (True, False)
    >>> has_loop([7, 7, 7], repeats=3, span=4), has_loop([7, 7, 7, 7], repeats=3, span=4)
    (False, True)
    """
    array = np.asarray(tokens)
    for period in range(1, len(array) // repeats + 1):
        needed = max(repeats * period, span) - period
        if _longest_run(array[period:] == array[:-period]) >= needed:
            return True
    return False


def _longest_run(flags: npt.NDArray[np.bool_]) -> int:
    """Length of the longest run of true values."""
    stops = np.flatnonzero(~np.concatenate([[False], flags, [False]]))
    return int(np.diff(stops).max()) - 1


def loop_rate(continuations: Sequence[Sequence[int]], repeats: int, span: int) -> float:
    """Share of continuations with a loop, as :func:`has_loop` finds it; 0 without continuations."""
    found = sum(has_loop(tokens, repeats, span) for tokens in continuations)
    return found / max(len(continuations), 1)


def distinct_rate(continuations: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams of all continuations together over all their n-grams; None if there is none.

    References
    ----------
    Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models, arXiv:1510.03055.

    Examples
    --------
    >>> distinct_rate([[1, 2, 1], [1, 2, 3]], 2)  # (1, 2), (2, 1) and (2, 3) of 4
    0.75
    """
    found = [gram for tokens in continuations for gram in ngrams(tokens, n)]
    return len(set(found)) / len(found) if found else None


def token_entropy(continuations: Sequence[Sequence[int]]) -> float | None:
    """Entropy of the tokens' frequencies in all continuations together, in nats; None without a token.

    Examples
    --------
    >>> token_entropy([[1, 2], [3, 4]]) == math.log(4)
    True
    """
    counts = Counter(token for tokens in continuations for token in tokens)
    total = sum(counts.values())
    if not total:
        return None
    return abs(math.fsum(count / total * math.log(total / count) for count in counts.values()))


def log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    """Logarithms of the probabilities along the last axis, in float64.

    Raises
    ------
    ValueError
        If a logit is NaN or plus infinity, or if all of a row are minus infinity.
    """
    values = np.asarray(logits, np.float64)
    highest = values.max(axis=-1, keepdims=True)
    if not np.isfinite(highest).all():
        raise ValueError("a next-token distribution is not finite")
    shifted = values - highest
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def entropies(logits: Floats) -> npt.NDArray[np.float64]:
    """Entropy of each row of `logits`, shape (rows, vocabulary), in nats.

    Examples
    --------
    >>> entropies(np.zeros((1, 8))) / np.log(2)
    array([3.])
    """
    logs = log_softmax(logits)
    return np.asarray(-_weighted(logs, logs))


def divergences(logits: Floats, reference: Floats) -> npt.NDArray[np.float64]:
    """KL(p || q) of each row, p from `logits` and q from `reference`, in nats.

    Parameters
    ----------
    logits, reference : ndarray, shape (rows, vocabulary)
        Not modified. A token that p rules out (minus infinity) counts nothing; one that q alone rules out is infinite.

    Returns
    -------
    float64 ndarray, shape (rows,)

    Examples
    --------
    >>> p, q = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
    >>> divergences(p, q), divergences(q, p)
    (array([0.14384104]), array([0.13081204]))
    """
    first, second = log_softmax(logits), log_softmax(reference)
    with np.errstate(invalid="ignore"):  # minus infinity less minus infinity, which has no weight
        return np.asarray(np.maximum(_weighted(first, first - second), 0.0))


def _weighted(logs: npt.NDArray[np.float64], values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Expectation of `values` under the probabilities whose logarithms are `logs`, row by row."""
    probabilities = np.exp(logs)
    with np.errstate(invalid="ignore"):  # nothing times infinity, which is left out
        terms = probabilities * values
    return np.asarray(np.where(probabilities == 0.0, 0.0, terms).sum(axis=-1))


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Spearman's rank correlation; ties take the mean of their ranks. None if all of `x` or all of `y` are equal.

    Examples
    --------
    >>> rank_correlation([1, 2, 3, 4], [10, 20, 40, 30]), rank_correlation([1, 2], [5, 5])
    (0.8, None)
    """
    first, second = (_ranks(values) - (len(values) - 1) / 2 for values in (x, y))
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / scale if scale else None


def _ranks(values: Sequence[float]) -> npt.NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    order = np.sort(array)
    # What is smaller, and half of what is equal beside the value itself.
    return np.asarray((np.searchsorted(order, array, "left") + np.searchsorted(order, array, "right") - 1) / 2)
