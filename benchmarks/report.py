"""What every benchmark prints and saves: figures with their units, the versions, the commit and the machine."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

_ROOT = Path(__file__).resolve().parents[1]
_LIBRARIES = ("mergepipe", "numpy", "numba", "dask", "zarr", "torch", "safetensors", "ml_dtypes")


@dataclass(frozen=True)
class Figure:
    """One line of a report: the median of some repeats, and their range."""

    name: str
    value: float
    unit: str
    low: float
    high: float


@dataclass
class Report:
    """The figures of one benchmark, printed as they come in.

    Attributes
    ----------
    benchmark : str
    settings : dict
        What the figures depend on: sizes, repeats.
    figures : list of Figure
    """

    benchmark: str
    settings: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    def add(self, name: str, values: float | Sequence[float], unit: str) -> float:
        """Add and print a figure; its median is returned."""
        listed = [float(values)] if isinstance(values, int | float) else [float(value) for value in values]
        median = self.keep(name, listed, unit)
        spread = f"   ({min(listed):.4g} to {max(listed):.4g})" if len(listed) > 1 else ""
        click.echo(f"{name:<58} {median:>10.4g} {unit}{spread}")
        return median

    def keep(self, name: str, values: float | Sequence[float], unit: str) -> float:
        """Add a figure that is printed in another way; its median is returned."""
        listed = [float(values)] if isinstance(values, int | float) else [float(value) for value in values]
        median = statistics.median(listed)
        self.figures.append(Figure(name, median, unit, min(listed), max(listed)))
        return median

    def add_rate(self, name: str, times_ns: Sequence[float], nbytes: int, memcpy: float) -> None:
        """Add the rate of what moves `nbytes` per element in these times per element, and what it is of memcpy's."""
        rate = self.add(name, [nbytes / time_ns for time_ns in times_ns], "GB/s")
        self.add(f"{name} / memcpy", rate / memcpy, "x")

    def memcpy(self, values: NDArray[Any], repeats: int) -> float:
        """Add the rate of a copy, in bytes read and written per second, in GB/s."""
        copies, times = np.empty_like(values), []
        for _ in range(repeats + 1):
            began = time.thread_time()
            np.copyto(copies, values)
            times.append(time.thread_time() - began)
        return self.add("memcpy, read and written", [2e-9 * values.nbytes / took for took in times[1:]], "GB/s")

    def save(self, path: Path | None) -> None:
        """Write everything as JSON, if a path is given."""
        if path is not None:
            path.write_text(json.dumps({**asdict(self), "versions": versions(), "machine": machine()}, indent=2) + "\n")


def versions() -> dict[str, str]:
    """Versions of Python, of the libraries that the figures depend on, and the commit of this project."""
    found = {"python": platform.python_version(), "commit": commit()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit(root: Path = _ROOT) -> str:
    """What git calls the commit in this folder, "-dirty" if files differ from it; "unknown" where git can't say."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """The processor, how many of it, and the memory."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"processor": model, "processors": len(os.sched_getaffinity(0)), "memory_bytes": memory}


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """``--quick``, ``--json`` and ``--folder``, which every benchmark has."""
    options = (
        click.option("--quick", is_flag=True, help="A size that only shows that the benchmark works."),
        click.option("--json", "json_path", type=click.Path(path_type=Path), help="Save the figures here as JSON."),
        click.option(
            "--folder", type=click.Path(path_type=Path, file_okay=False), help="Where the temporary data goes."
        ),
    )
    for option in options:
        command = option(command)
    return command
