"""The data types of a checkpoint: their names in the three places they have names, and what a merge does with each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """One data type.

    Attributes
    ----------
    name : str
        As safetensors writes it: "BF16".
    alias : str
        As recipes, torch and zarr write it: "bfloat16".
    numpy : numpy dtype
        The logical type; `ml_dtypes.bfloat16` for BF16.
    bits : numpy dtype
        The type the bytes are viewed as where they are handled: uint16 for BF16 and F16, else `numpy`.
    role : {'merged', 'copied', 'refused'}
        What a merge does with a tensor of this type: arithmetic, take it from the base, or refuse (quantised codes).
    """

    name: str
    alias: str
    numpy: np.dtype[Any]
    bits: np.dtype[Any]
    role: Literal["merged", "copied", "refused"]

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return self.numpy.itemsize


def _dtype(name: str, alias: str, numpy: Any, role: Literal["merged", "copied", "refused"], bits: Any = None) -> DType:
    return DType(name, alias, np.dtype(numpy), np.dtype(numpy if bits is None else bits), role)


DTYPES: dict[str, DType] = {
    dtype.name: dtype
    for dtype in (
        _dtype("F64", "float64", "<f8", "merged"),
        _dtype("F32", "float32", "<f4", "merged"),
        _dtype("F16", "float16", "<f2", "merged", "<u2"),
        _dtype("BF16", "bfloat16", ml_dtypes.bfloat16, "merged", "<u2"),
        _dtype("I64", "int64", "<i8", "copied"),
        _dtype("I32", "int32", "<i4", "copied"),
        _dtype("I16", "int16", "<i2", "copied"),
        _dtype("I8", "int8", "i1", "copied"),
        _dtype("U64", "uint64", "<u8", "copied"),
        _dtype("U32", "uint32", "<u4", "copied"),
        _dtype("U16", "uint16", "<u2", "copied"),
        _dtype("U8", "uint8", "u1", "copied"),
        _dtype("BOOL", "bool", "?", "copied"),
        _dtype("F8_E4M3", "float8_e4m3fn", ml_dtypes.float8_e4m3fn, "refused", "u1"),
        _dtype("F8_E5M2", "float8_e5m2", ml_dtypes.float8_e5m2, "refused", "u1"),
    )
}
"""Every known type, by its safetensors name."""

MERGED_ALIASES = {dtype.alias: dtype for dtype in DTYPES.values() if dtype.role == "merged"}
"""The types a recipe may ask for, by the name it uses."""
