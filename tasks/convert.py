"""Stored bits to the working type and back: BF16, F16, F32, F64 and 8-bit floats, one rounding at the end.

Every loop is free of branches, so that it vectorises; whether a tile holds a NaN or an infinity is found on the way, as
the maximum of the exponents seen, and only a tile that does is looked at again to say where.

Decoding is exact. Encoding rounds once, to nearest with ties to even: a float64 is first rounded *to odd* to float32,
which leaves the second rounding nothing to get wrong. NaN is written as 0x7fc0 (BF16) or 0x7e00 (F16).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mergepipe.tasks.jit import inlined, kernel
from mergepipe.tasks.method import Array

F16_UNIT = np.float32(2.0**112)
"""Times this, a half shifted into a float32 has the right exponent (its bias is 127, not 15); exact, subnormals too."""

F16_ONE = np.float32(0.5)
"""Added to a magnitude below 2**-14, it puts the last bit of the sum at 2**-24, the unit of a subnormal half."""


@inlined
def _half_to_single(half: Any) -> Any:
    magnitude = np.int32(np.int32(half & 0x7FFF) << 13).view(np.float32) * F16_UNIT
    bits = np.float32(magnitude).view(np.int32)
    bits = np.int32(bits | 0x7F800000) if (half & 0x7C00) == 0x7C00 else bits
    return np.int32(bits | np.int32((half & 0x8000) << 16)).view(np.float32)


@inlined
def _single_to_bfloat(bits: Any) -> Any:
    rounded = np.int32(np.int32(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
    return np.int32(0x7FC0) if np.int32(bits & 0x7FFFFFFF) > 0x7F800000 else rounded


@inlined
def _single_to_half(bits: Any) -> Any:
    magnitude = np.int32(bits & 0x7FFFFFFF)
    normal = np.int32(np.int32(magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13)
    tiny = np.int32(np.float32(magnitude.view(np.float32) + F16_ONE).view(np.int32) - 0x3F000000)
    rounded = tiny if magnitude < 0x38800000 else min(normal, np.int32(0x7C00))
    return np.int32(0x7E00) if magnitude > 0x7F800000 else np.int32(rounded | ((bits >> 16) & 0x8000))


@inlined
def _to_odd(value: Any) -> Any:
    """Bits of a float64 rounded to float32: towards zero, with the last bit set where that was not exact."""
    single = np.float32(value)
    bits = single.view(np.int32)
    over = np.int32(1) if abs(np.float64(single)) > abs(value) else np.int32(0)
    inexact = np.int32(1) if (np.float64(single) != value) and (value == value) else np.int32(0)
    return np.int32(np.int32(bits - over) | inexact)


@kernel
def _decode_bf16(bits: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32)
    return bool(worst >= 0x7F80)


@kernel
def _delta_bf16(bits: Array, base: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = np.int32(stored << 16).view(np.float32) - base[i]
    return bool(worst >= 0x7F80)


@kernel
def _decode_f16(bits: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = _half_to_single(stored)
    return bool(worst >= 0x7C00)


@kernel
def _delta_f16(bits: Array, base: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        stored = np.int32(bits[i])
        worst = max(worst, np.int32(stored & 0x7FFF))
        out[i] = _half_to_single(stored) - base[i]
    return bool(worst >= 0x7C00)


@kernel
def _decode_f32(bits: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        value = np.float32(bits[i])
        worst = max(worst, np.int32(value.view(np.int32) & 0x7FFFFFFF))
        out[i] = value
    return bool(worst >= 0x7F800000)


@kernel
def _delta_f32(bits: Array, base: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        value = np.float32(bits[i])
        worst = max(worst, np.int32(value.view(np.int32) & 0x7FFFFFFF))
        out[i] = value - base[i]
    return bool(worst >= 0x7F800000)


@kernel
def _decode_f64(bits: Array, out: Array) -> bool:
    worst = np.int64(0)
    for i in range(out.size):
        value = np.float64(bits[i])
        worst = max(worst, value.view(np.int64) & 0x7FFFFFFFFFFFFFFF)
        out[i] = value
    return bool(worst >= 0x7FF0000000000000)


@kernel
def _delta_f64(bits: Array, base: Array, out: Array) -> bool:
    worst = np.int64(0)
    for i in range(out.size):
        value = np.float64(bits[i])
        worst = max(worst, value.view(np.int64) & 0x7FFFFFFFFFFFFFFF)
        out[i] = value - base[i]
    return bool(worst >= 0x7FF0000000000000)


_F8_E4M3 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
_F8_E5M2 = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float32)
"""What each of the 256 codes stands for, before its scale."""


@kernel
def _decode_f8_e4m3(bits: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        code = np.int32(bits[i])
        worst = max(worst, np.int32(code & 0x7F))
        out[i] = _F8_E4M3[code]
    return bool(worst == 0x7F)


@kernel
def _decode_f8_e5m2(bits: Array, out: Array) -> bool:
    worst = np.int32(0)
    for i in range(out.size):
        code = np.int32(bits[i])
        worst = max(worst, np.int32(code & 0x7F))
        out[i] = _F8_E5M2[code]
    return bool(worst >= 0x7C)


_DECODE: dict[str, Callable[[Array, Array], bool]] = {
    "BF16": _decode_bf16, "F16": _decode_f16, "F32": _decode_f32, "F64": _decode_f64,
    "F8_E4M3": _decode_f8_e4m3, "F8_E5M2": _decode_f8_e5m2,
}  # fmt: skip
_DELTA: dict[str, Callable[[Array, Array, Array], bool]] = {
    "BF16": _delta_bf16, "F16": _delta_f16, "F32": _delta_f32, "F64": _delta_f64,
}  # fmt: skip
_EXPONENT = {"BF16": 0x7F80, "F16": 0x7C00, "F8_E4M3": 0x7F, "F8_E5M2": 0x7C}
"""Bits that are all set in what is not finite."""


def _first_non_finite(bits: Array, dtype_name: str) -> int:
    exponent = _EXPONENT.get(dtype_name)
    bad = ~np.isfinite(bits) if exponent is None else (bits & exponent) == exponent
    return int(np.argmax(bad))


def decode(bits: Array, dtype_name: str, out: Array) -> int:
    """Stored bits to the working type; exact.

    Parameters
    ----------
    bits : ndarray, shape (n,)
        uint8 for 8-bit floats, uint16 for "BF16" and "F16", float32 for "F32", float64 for "F64". Not modified.
    dtype_name : {'BF16', 'F16', 'F32', 'F64', 'F8_E4M3', 'F8_E5M2'}
        Of the last two, the codes' own values: their scales are another matter (:mod:`mergepipe.tasks.adjust`).
    out : float32 or float64 ndarray, shape (n,)
        Overwritten. Must not share memory with `bits`.

    Returns
    -------
    int
        Index of the first NaN or infinity, -1 if there is none.

    Examples
    --------
    >>> out = np.empty(3, np.float32)
    >>> decode(np.array([0x3F80, 0xC000, 0x7F80], np.uint16), "BF16", out), out.tolist()
    (2, [1.0, -2.0, inf])
    """
    return _first_non_finite(bits, dtype_name) if _DECODE[dtype_name](bits, out) else -1


def decode_delta(bits: Array, dtype_name: str, base: Array, out: Array) -> int:
    """Stored bits minus the base, subtracted in the working type.

    Parameters
    ----------
    bits, dtype_name, out
        As in :func:`decode`.
    base : ndarray, shape (n,)
        In the working type. Not modified; must not share memory with `out`.

    Returns
    -------
    int
        Index of the first NaN or infinity among the stored values, -1 if there is none.
    """
    return _first_non_finite(bits, dtype_name) if _DELTA[dtype_name](bits, base, out) else -1


@kernel
def _encode_bf16_single(values: Array, out: Array) -> bool:
    overflow = np.int32(0)
    for i in range(out.size):
        bits = np.float32(values[i]).view(np.int32)
        magnitude = np.int32(bits & 0x7FFFFFFF)
        overflow |= np.int32((magnitude >= 0x7F7F8000) & (magnitude < 0x7F800000))
        out[i] = np.uint16(_single_to_bfloat(bits))
    return bool(overflow)


@kernel
def _encode_bf16_double(values: Array, out: Array) -> bool:
    overflow = np.int32(0)
    for i in range(out.size):
        bits = _to_odd(values[i])
        magnitude = np.int32(bits & 0x7FFFFFFF)
        overflow |= np.int32((magnitude >= 0x7F7F8000) & (magnitude < 0x7F800000))
        out[i] = np.uint16(_single_to_bfloat(bits))
    return bool(overflow)


@kernel
def _encode_f16_single(values: Array, out: Array) -> bool:
    overflow = np.int32(0)
    for i in range(out.size):
        bits = np.float32(values[i]).view(np.int32)
        magnitude = np.int32(bits & 0x7FFFFFFF)
        overflow |= np.int32((magnitude >= 0x477FF000) & (magnitude < 0x7F800000))
        out[i] = np.uint16(_single_to_half(bits))
    return bool(overflow)


@kernel
def _encode_f16_double(values: Array, out: Array) -> bool:
    overflow = np.int32(0)
    for i in range(out.size):
        bits = _to_odd(values[i])
        magnitude = np.int32(bits & 0x7FFFFFFF)
        overflow |= np.int32((magnitude >= 0x477FF000) & (magnitude < 0x7F800000))
        out[i] = np.uint16(_single_to_half(bits))
    return bool(overflow)


@kernel
def _encode_float(values: Array, out: Array) -> bool:
    overflow = np.int32(0)
    for i in range(out.size):
        value = values[i]
        out[i] = value
        overflow |= np.int32((abs(out[i]) == np.inf) & (abs(value) != np.inf))
    return bool(overflow)


_ENCODE: dict[tuple[str, str], Callable[[Array, Array], bool]] = {
    ("BF16", "float32"): _encode_bf16_single, ("BF16", "float64"): _encode_bf16_double,
    ("F16", "float32"): _encode_f16_single, ("F16", "float64"): _encode_f16_double,
    ("F32", "float32"): _encode_float, ("F32", "float64"): _encode_float,
    ("F64", "float32"): _encode_float, ("F64", "float64"): _encode_float,
}  # fmt: skip


def _first_overflow(values: Array, dtype_name: str, out: Array) -> int:
    exponent = _EXPONENT.get(dtype_name)
    infinite = np.isinf(out) if exponent is None else (out & 0x7FFF) == exponent
    return int(np.argmax(infinite & np.isfinite(values)))


def encode(values: Array, dtype_name: str, out: Array) -> int:
    """The working type to stored bits: rounded once, to nearest, ties to even.

    Parameters
    ----------
    values : float32 or float64 ndarray, shape (n,)
        Not modified.
    dtype_name : {'BF16', 'F16', 'F32', 'F64'}
    out : ndarray, shape (n,)
        Overwritten; uint16 for "BF16" and "F16", float32 for "F32", float64 for "F64". Must not share memory with
        `values`.

    Returns
    -------
    int
        Index of the first value that was finite and is infinite in `out`, -1 if there is none.

    Examples
    --------
    >>> out = np.empty(3, np.uint16)
    >>> encode(np.array([1.0, -2.0, 70000.0], np.float32), "F16", out), [hex(bits) for bits in out]
    (2, ['0x3c00', '0xc000', '0x7c00'])
    """
    overflow = _ENCODE[dtype_name, values.dtype.name](values, out)
    return _first_overflow(values, dtype_name, out) if overflow else -1
