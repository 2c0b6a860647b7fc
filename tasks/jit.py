"""The one way a kernel is compiled: without the GIL, on one thread, cached on disk.

`parallel=True` is never used: in a worker thread numba's thread layer aborts the process, and our own threads are as
fast. `fastmath` is never used: the order of additions is part of the result. `error_model="numpy"` drops the test for a
division by zero, which keeps loops from vectorising; kernels test where they divide.

numba takes a third of a second to import, so it is imported with the first kernel that is called: to make a plan, none
is, and in a run the first reads are under way by then.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable
from functools import cache, update_wrapper
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

UNROLLED = 4000
"""LLVM's measure of how large a loop may be to be unrolled whole. What it has by itself is enough for four models or
five; a loop over elements with one over models left inside is not vectorised, and 20 times slower."""


class _Kernel:
    """What stands for a kernel; whatever numba asks of it when another kernel calls it, numba's own object answers."""

    _making = threading.RLock()

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        self._function = function
        self._options = options
        self._dispatcher: Any = None
        update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        return (self._dispatcher or self._made())(*arguments)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._made(), name)

    def _made(self) -> Any:
        with self._making:
            if self._dispatcher is None:
                made = _numba().njit(nogil=True, error_model="numpy", **self._options)(self._function)
                if "cache" in self._options:
                    # numba asks whether the kernel's own file has changed, and knows nothing of what it is linked with.
                    kept = made._cache._cache_file
                    kept._source_stamp = kept._source_stamp, sources()
                self._dispatcher = made
        return self._dispatcher


@cache
def sources() -> str:
    """What stands for the text of all files of this package, from which kernels take each other and constants."""
    found = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()


@cache
def _numba() -> ModuleType:
    """numba, set up; wherever SciPy is installed it loads its linear algebra too, to have a BLAS at hand.

    That takes a quarter of a second of CPU, half of it the idle threads of one more OpenBLAS, and no kernel of ours
    multiplies matrices. So numba finds no SciPy while it is loaded; a kernel of somebody else that does multiply finds
    it later, when it is compiled.
    """
    hidden = "scipy" not in sys.modules
    if hidden:
        sys.modules["scipy"] = None  # type: ignore[assignment]  # how Python marks what is not to be found
    try:
        import numba
        import numba.np.arraymath
    finally:
        if hidden:
            del sys.modules["scipy"]
    import llvmlite.binding

    core: Any = numba.core  # hardly typed
    # LLVM takes a setting only once a process.
    llvmlite.binding.set_option("mergepipe", f"-unroll-threshold={UNROLLED}")
    if core.config.CPU_FEATURES is None:  # else NUMBA_CPU_FEATURES says what is wanted
        core.config.CPU_FEATURES = whole_vectors(core.codegen.get_host_cpu_features())
    return numba


def whole_vectors(features: str) -> str:
    """The features of a processor, and that loops are to use vectors of 512 bits where they cost it no speed.

    LLVM uses half of them on every Intel processor that has them, because the first such lowered their clock. Those
    since Ice Lake, the first with AVX512-VBMI2, do not; there loops over what lies in caches take two thirds of the
    time. No bit of a result depends on it: reductions keep an order of their own.

    Examples
    --------
    >>> whole_vectors("+avx2,+avx512f,+avx512vbmi2")
    '+avx2,+avx512f,+avx512vbmi2,-prefer-256-bit'
    >>> whole_vectors("+avx2,+avx512f,-avx512vbmi2")
    '+avx2,+avx512f,-avx512vbmi2'
    """
    return f"{features},-prefer-256-bit" if "+avx512vbmi2" in features.split(",") else features


def kernel(function: F) -> F:
    """Compile a plain loop over arrays on first use; the type checker keeps seeing the function itself.

    It counts who holds an array whatever calls it: numba would have it do as its first caller does.
    """
    return cast(F, _Kernel(function, {"cache": True, "_nrt": True}))


def uncounted(function: F) -> F:
    """As :func:`kernel`, for one that makes no array of its own, of which there are slices or calls in a loop.

    numba counts who holds an array, with an atomic addition for each slice and each argument of a call; a loop over
    short rows or strips spends more on that than on a hundred elements. Whoever calls holds all the arrays meanwhile,
    so here nobody counts. An array that is made here, which numba mostly refuses to compile, or that a call returns
    would never be freed.
    """
    return cast(F, _Kernel(function, {"cache": True, "_nrt": False}))


def inlined(function: F) -> F:
    """As :func:`kernel`, for a small function that is only called from kernels."""
    return cast(F, _Kernel(function, {"inline": "always"}))


def inlined_late(function: F) -> F:
    """As :func:`inlined`, by LLVM: compiled in two thirds of the time where such functions call each other."""
    return cast(F, _Kernel(function, {"forceinline": True}))
