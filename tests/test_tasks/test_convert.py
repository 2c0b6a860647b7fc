"""Decoding and encoding against torch, over every 16-bit pattern and over many floats, and against exact rounding."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.tasks.convert import decode, decode_delta, encode
from mergepipe.tasks.method import Array

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16}
NAN = {"BF16": 0x7FC0, "F16": 0x7E00}
PATTERNS = np.arange(65536).astype(np.uint16)
STORED = {"BF16": np.uint16, "F16": np.uint16, "F32": np.float32, "F64": np.float64}


def torch_decoded(name: str, work: type) -> Array:
    decoded: Array = torch.from_numpy(PATTERNS.view(np.int16)).view(TORCH[name]).to(torch.float64).numpy().astype(work)
    return decoded


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_every_pattern_decodes_and_comes_back(name: str, work: type) -> None:
    expected = torch_decoded(name, work)
    out = np.empty(65536, work)
    assert decode(PATTERNS, name, out) == np.flatnonzero(~np.isfinite(expected))[0]
    np.testing.assert_array_equal(out, expected)
    assert (np.signbit(out) == np.signbit(expected))[~np.isnan(expected)].all()
    back = np.empty(65536, np.uint16)
    assert encode(out, name, back) == -1
    np.testing.assert_array_equal(back, np.where(np.isnan(expected), NAN[name], PATTERNS))


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_float32_rounds_as_torch_does(name: str) -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 400_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    middle = torch_decoded(name, np.float32)
    middle = middle[np.isfinite(middle) & (middle > 0)]
    halfway = (np.sort(middle)[1:].astype(np.float64) + np.sort(middle)[:-1]) / 2
    near = [np.nextafter(halfway.astype(np.float32), np.float32(to)) for to in (0, np.inf)]
    values = np.concatenate([bits, halfway.astype(np.float32), *near, rng.normal(0, 1e-7, 9999).astype(np.float32)])
    values = np.concatenate([values, -values])
    out = np.empty(values.size, np.uint16)
    first = encode(values, name, out)
    expected = torch.from_numpy(values).to(TORCH[name])
    nan = np.isnan(values)
    np.testing.assert_array_equal(out[~nan], expected.view(torch.int16).numpy().view(np.uint16)[~nan])
    assert (out[nan] == NAN[name]).all()
    overflow = np.flatnonzero(np.isfinite(values) & np.isinf(expected.to(torch.float32).numpy()))
    assert first == overflow[0]


def exactly_rounded(value: float, name: str) -> float:
    """To nearest, ties to even, by rational arithmetic."""
    mantissa, lowest, largest = (8, -133, 2.0**128) if name == "BF16" else (11, -24, 2.0**16)
    if value == 0:
        return value
    unit = Fraction(2) ** max(int(np.frexp(value)[1]) - mantissa, lowest)
    rounded = float(round(Fraction(value) / unit) * unit)
    return float(np.copysign(np.inf if abs(rounded) >= largest else rounded, value))


@pytest.mark.parametrize("name", ["BF16", "F16"])
@given(
    near=st.integers(0, 0x7BFE),
    nudge=st.sampled_from([0.0, 2.0**-40, -(2.0**-40), 2.0**-30, -(2.0**-30), 1e-3]),
    sign=st.sampled_from([1.0, -1.0]),
)
def test_float64_rounds_once(name: str, near: int, nudge: float, sign: float) -> None:
    """Just beside the middle between two neighbours, where a rounding to float32 on the way would fall onto it."""
    low, high = torch_decoded(name, np.float64)[near : near + 2]
    value = np.array([sign * ((low + high) / 2) * (1 + nudge)])
    out = np.empty(1, np.uint16)
    encode(value, name, out)
    got = np.empty(1)
    decode(out, name, got)
    assert got[0] == exactly_rounded(float(value[0]), name)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_float64_extremes(name: str) -> None:
    values = np.array([0.0, -0.0, 5e-324, -1e-46, 1e300, -1e300, np.inf, -np.inf, np.nan, 3.4028235677973366e38])
    out, got = np.empty(values.size, np.uint16), np.empty(values.size)
    assert encode(values, name, out) == 4
    decode(out, name, got)
    np.testing.assert_array_equal(got, [0, -0.0, 0, 0, np.inf, -np.inf, np.inf, -np.inf, np.nan, np.inf])
    assert np.signbit(got).tolist() == np.signbit(values).tolist()
    assert out[8] == NAN[name]


@pytest.mark.parametrize("work", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["F32", "F64"])
def test_whole_floats(name: str, work: type) -> None:
    values = np.random.default_rng(1).normal(size=1001).astype(work)
    out = np.empty(1001, STORED[name])
    assert encode(values, name, out) == -1
    np.testing.assert_array_equal(out, values.astype(STORED[name]))
    if not (name == "F64" and work is np.float32):
        back = np.empty(1001, work)
        assert decode(out, name, back) == -1
        np.testing.assert_array_equal(back, out.astype(work))
    if name == "F32" and work is np.float64:
        values[7] = 1e300
        assert encode(values, name, out) == 7


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
def test_first_non_finite_element_is_named(name: str, bad: float) -> None:
    work = np.float64 if name == "F64" else np.float32
    values = np.linspace(-1, 1, 777).astype(work)
    values[[500, 600]] = bad
    bits = np.empty(777, STORED[name])
    encode(values, name, bits)
    out = np.empty(777, work)
    assert decode(bits, name, out) == 500
    assert decode_delta(bits, name, np.zeros(777, work), out) == 500
    assert decode(bits[:500], name, out[:500]) == -1
    assert decode(bits[:0], name, out[:0]) == -1


@pytest.mark.parametrize(("name", "work"), [("BF16", "f4"), ("F16", "f4"), ("F32", "f4"), ("F32", "f8"), ("F64", "f8")])
def test_delta_is_decoded_minus_base(name: str, work: str) -> None:
    rng = np.random.default_rng(2)
    bits, base = np.empty(3001, STORED[name]), rng.normal(size=3001).astype(work)
    encode((base + rng.normal(0, 0.01, 3001)).astype(work), name, bits)
    bits.flags.writeable = False
    decoded, delta = np.empty(3001, work), np.empty(3001, work)
    decode(bits, name, decoded)
    assert decode_delta(bits, name, base, delta) == -1
    np.testing.assert_array_equal(delta, decoded - base)
