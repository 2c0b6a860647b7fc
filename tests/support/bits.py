"""Small models as stored bits, for tests of what works on these."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mergepipe.tasks import convert

U16 = npt.NDArray[np.uint16]
F32 = npt.NDArray[np.float32]


def drawn(size: int, models: int, seed: int) -> tuple[U16, tuple[U16, ...]]:
    """A base and fine-tunes of it; some values are equal, some zero, some subnormal."""
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(size, np.float32) * np.float32(0.02)
    base[rng.random(size) < 0.1] = 0
    base[rng.random(size) < 0.05] = 1e-39
    rows = [base + (rng.random(size) < 0.8) * rng.standard_normal(size, np.float32) * 0.001 for _ in range(models)]
    return as_bits(base), tuple(as_bits(row) for row in rows)


def as_stored(bits: U16) -> U16:
    """As a run reads them: for bits that may be written, too, the compiler would make kernels of their own."""
    found = bits.view()
    found.flags.writeable = False
    return found


def as_bits(values: npt.ArrayLike) -> U16:
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def deltas(base: U16, rows: tuple[U16, ...]) -> tuple[F32, F32]:
    below = np.empty(base.size, np.float32)
    convert.decode(base, "BF16", below)
    values = np.empty((len(rows), base.size), np.float32)
    for row, out in zip(rows, values, strict=True):
        convert.decode_delta(row, "BF16", below, out)
    return below, values


def settings_for(models: int, seed: int) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    rng = np.random.default_rng(seed)
    weights = tuple(float(x) for x in rng.choice([0.0, 0.3, 1.0, -0.5], models))
    return weights, tuple(float(x) for x in rng.random(models) * 0.002), tuple(float(x) for x in 1 + rng.random(models))
