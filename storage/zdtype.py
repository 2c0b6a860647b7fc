"""The zarr data type ``bfloat16``: as other zarr readers (tensorstore, for one) know it, backed by `ml_dtypes`.

zarr-python 3.1 has no bfloat16 of its own. Importing this module changes nothing; :func:`register` does, and may be
called any number of times.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import ml_dtypes
import numpy as np
from zarr.core.dtype.common import HasEndianness, HasItemSize
from zarr.dtype import DataTypeValidationError, ZDType, data_type_registry

NAME: Literal["bfloat16"] = "bfloat16"

_NATIVE: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


@dataclass(frozen=True, kw_only=True, slots=True)
class BFloat16(ZDType[Any, Any], HasEndianness, HasItemSize):
    """bfloat16 in zarr format 3. Zarr format 2 has no name for it, so there it is refused."""

    dtype_cls: ClassVar[type[np.dtype[Any]]] = type(_NATIVE)
    _zarr_v3_name: ClassVar[str] = NAME

    @classmethod
    def from_native_dtype(cls, dtype: np.dtype[Any]) -> Self:
        """From `np.dtype(ml_dtypes.bfloat16)`; any other type is refused."""
        if dtype == _NATIVE:
            return cls()
        raise DataTypeValidationError(f"expected bfloat16, found {dtype}")

    def to_native_dtype(self) -> np.dtype[Any]:
        """`np.dtype(ml_dtypes.bfloat16)`."""
        if self.endianness != "little":
            raise DataTypeValidationError("bfloat16 is stored in little-endian order only")
        return _NATIVE

    @classmethod
    def _from_json_v2(cls, data: object) -> Self:
        raise DataTypeValidationError("zarr format 2 has no bfloat16")

    @classmethod
    def _from_json_v3(cls, data: object) -> Self:
        if data == NAME:
            return cls()
        raise DataTypeValidationError(f"expected {NAME!r}, found {data!r}")

    def to_json(self, zarr_format: Literal[2, 3]) -> Any:
        """The name in the metadata of zarr format 3."""
        if zarr_format == 2:
            raise ValueError("zarr format 2 has no bfloat16: use zarr format 3")
        return NAME

    def _check_scalar(self, data: object) -> bool:
        return isinstance(data, int | float | np.number | ml_dtypes.bfloat16)

    def cast_scalar(self, data: object) -> Any:
        """A number as a bfloat16 scalar."""
        if not self._check_scalar(data):
            raise TypeError(f"expected a number, found {data!r}")
        return ml_dtypes.bfloat16(data)

    def default_scalar(self) -> Any:
        """Zero."""
        return ml_dtypes.bfloat16(0)

    def from_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> Any:
        """A fill value from metadata: a number, "NaN", "Infinity", "-Infinity" or the bits as "0x7fc0"."""
        if isinstance(data, str) and data.startswith("0x"):
            return np.array(int(data, 16), "<u2").view(_NATIVE)[()]
        if isinstance(data, str) and data in _SPECIAL:
            return ml_dtypes.bfloat16(_SPECIAL[data])
        return self.cast_scalar(data)

    def to_json_scalar(self, data: object, *, zarr_format: Literal[2, 3]) -> float | str:
        """A fill value for metadata, as :meth:`from_json_scalar` reads it."""
        value = float(self.cast_scalar(data))
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

    @property
    def item_size(self) -> int:
        """Two bytes."""
        return 2


def register() -> None:
    """Make zarr-python in this process read and write ``bfloat16``, unless it already can."""
    if NAME not in data_type_registry.contents:
        data_type_registry.register(NAME, BFloat16)
