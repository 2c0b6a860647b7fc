"""TIES with TADrop once more, tensor by tensor and in float64: what the output of a proof is held against.

The arithmetic is written down as the method reads, element by element. It is no part of what is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

PIECE = 1 << 22
KEEP_ALL = -1.0
_FLOATS = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
"""The number that each 16 bits stand for."""

Bits = npt.NDArray[np.uint16]


def tensors_of(folder: Path) -> dict[str, Bits]:
    """The tensors of a bfloat16 checkpoint, flat, as maps of the bits in its files."""
    found: dict[str, Bits] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(start - 8))
        for name, entry in entries.items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", f"'{name}' is {entry['dtype']}"
                count = math.prod(entry["shape"])
                found[name] = np.memmap(path, np.uint16, "r", start + entry["data_offsets"][0], (count,))
    return found


def largest_deviation(base: Bits, experts: Sequence[Bits], weights: Sequence[float], merged: Bits) -> float:
    """How far a merged tensor is from the float64 reference, in half units of the last place of bfloat16.

    Parameters
    ----------
    base, merged : uint16, shape (n,)
        Bits of bfloat16 numbers.
    experts : sequence of the same
    weights : sequence of float

    Returns
    -------
    float
        At most 1 where every element is the reference, rounded once, but for what float32 arithmetic may add: 2**-23 of
        the magnitudes of the base and of the merged task vector, which is much where they cancel.
    """
    cuts = np.array([_threshold(base, expert) for expert in experts])
    # Half a unit in the last of eight bits; below the smallest normal number of bfloat16 units stay as they are.
    half_units = np.ldexp(1.0, np.maximum(np.arange(1 << 11) - 1023, -126) - 8)
    worst = 0.0
    for start in range(0, base.size, PIECE):
        piece = slice(start, start + PIECE)
        values = np.stack([_FLOATS[expert[piece]] for expert in experts])
        expected, slack = np.empty((2, values.shape[1]))
        _expect(_FLOATS[base[piece]], values, np.array(weights), cuts, expected, slack)
        found = _furthest(expected, expected.view(np.int64), slack, _FLOATS[merged[piece]], half_units)
        worst = max(worst, found)
    return worst


def _threshold(base: Bits, expert: Bits) -> float:
    """The magnitude below which TADrop drops: its rate is the ratio of the 50 % to the 95 % quantile of magnitudes."""
    n = base.size
    low, high = _ranked(base, expert, [max(math.ceil(p * n - 1e-9) - 1, 0) for p in (0.5, 0.95)])
    density = low / high if high else 0.0
    dropped = min(n - 1, math.floor(min(density, 0.99) * n + 1e-6))
    return _ranked(base, expert, [dropped])[0] if dropped > 0 else KEEP_ALL


def _ranked(base: Bits, expert: Bits, ranks: Sequence[int]) -> list[float]:
    """The magnitudes of a task vector that so many others come before.

    Found by their bits, the upper half first: sorting needs a copy of the tensor, and NumPy's partition takes minutes
    over so many equal values.
    """
    coarse = np.zeros(1 << 16, np.int64)
    _count(base, expert, _FLOATS, coarse, np.empty(0, np.int64), np.empty((0, 0), np.int64))
    before = np.cumsum(coarse)
    uppers = np.searchsorted(before, ranks, side="right")
    fine = np.zeros((len(ranks), 1 << 16), np.int64)
    _count(base, expert, _FLOATS, np.empty(0, np.int64), uppers, fine)
    found = []
    for rank, upper, counts in zip(ranks, uppers, fine, strict=True):
        left = rank - (before[upper] - coarse[upper])
        lower = np.searchsorted(np.cumsum(counts), left, side="right")
        found.append(float(np.uint32(upper << 16 | lower).view(np.float32)))
    return found


@numba.njit(nogil=True)
def _count(base: Any, expert: Any, floats: Any, coarse: Any, uppers: Any, fine: Any) -> None:
    """Count magnitudes by the upper half of their bits, and by the lower half where the upper one is wanted."""
    piece = 1 << 14
    magnitudes = np.empty(piece, np.float32)
    bits = magnitudes.view(np.uint32)
    for start in range(0, base.size, piece):
        size = min(piece, base.size - start)
        for i in range(size):
            magnitudes[i] = abs(floats[expert[start + i]] - floats[base[start + i]])
        if coarse.size:
            for i in range(size):
                coarse[bits[i] >> 16] += 1
        for rank in range(uppers.size):
            for i in range(size):
                if bits[i] >> 16 == uppers[rank]:
                    fine[rank, bits[i] & 0xFFFF] += 1


@numba.njit(nogil=True)
def _expect(base: Any, experts: Any, weights: Any, cuts: Any, expected: Any, slack: Any) -> None:
    """The merge in float64, and what float32 arithmetic may differ by."""
    for i in range(base.size):
        start, total = np.float64(base[i]), 0.0
        for k in range(weights.size):
            delta = np.float64(experts[k, i]) - start
            if abs(np.float32(delta)) >= cuts[k]:
                total += weights[k] * delta
        sign = 1.0 if total >= 0 else -1.0
        agreeing, divisor = 0.0, 0.0
        for k in range(weights.size):
            delta = np.float64(experts[k, i]) - start
            if abs(np.float32(delta)) >= cuts[k] and weights[k] * delta * sign > 0:
                agreeing += weights[k] * delta
                divisor += weights[k]
        change = agreeing / divisor if divisor > 0 else 0.0
        expected[i] = start + change
        slack[i] = (abs(start) + abs(change)) * 2.0**-23


@numba.njit(nogil=True)
def _furthest(expected: Any, exponents: Any, slack: Any, merged: Any, half_units: Any) -> float:
    worst = 0.0
    for i in range(expected.size):
        distance = abs(np.float64(merged[i]) - expected[i]) - slack[i]
        worst = max(worst, distance / half_units[exponents[i] >> 52 & 0x7FF])
    return worst
