"""The model of cost: seconds of a run from bytes, elements and a machine. Pure arithmetic.

    seconds = start-up + max(bytes read / read rate + bytes written / write rate, arithmetic)
    arithmetic = elements x CPU per element / processors + products x CPU per product / matrices at once

Reads and writes take turns, the processors work meanwhile; a whole matrix is worked on by one of them, and as many
matrices at once as the ceiling has room for. CPU times per element are those of whole runs by
`benchmarks/bench_methods.py`, kept in `benchmarks/measured.json`: hashing, graphs and copies are in them. Rates of the
disks are round figures of what such disks do, not measurements: state your own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MEASURED = Path(__file__).with_name("measured.json")
START_UP_S = 2.0
"""Interpreter, libraries, journal and the last syncs; no share of anything large."""


@dataclass(frozen=True)
class Machine:
    """What a merge runs on: rates in bytes per second, and processors as fast as those of `measured.json`."""

    name: str
    read: float
    write: float
    processors: int


MACHINES = (
    Machine("laptop SSD", 2.0e9, 1.0e9, 8),
    Machine("NVMe workstation", 6.0e9, 4.0e9, 16),
    Machine("network disk", 0.25e9, 0.25e9, 8),
)


@dataclass(frozen=True)
class Work:
    """What a merge does.

    Attributes
    ----------
    read, written : int
        Bytes that pass through the disk.
    elements : int
        Input values of tensors that go through a kernel, counted once however often they are read.
    products : float
        Sum over the tensors worked on as whole matrices: models x smaller side squared x larger side.
    matrices : int
        Of the largest of these, how many fit the ceiling at once.
    """

    read: int
    written: int
    elements: int
    products: float
    matrices: int = 1


@dataclass(frozen=True)
class Cpu:
    """Processor seconds of a merge: of what is done element by element, and of whole matrices."""

    elements: float
    products: float


@dataclass(frozen=True)
class Times:
    """Seconds of a run: of its disk, of its arithmetic, and of the whole."""

    disk: float
    arithmetic: float
    whole: float


@dataclass(frozen=True)
class Rates:
    """CPU nanoseconds per element read, of each method, and per product, of those that factor whole matrices."""

    element: Mapping[str, float]
    product: Mapping[str, float]

    @staticmethod
    def load(path: Path = MEASURED) -> Rates:
        """Those that `bench_methods --json` has saved."""
        found: dict[str, dict[str, float]] = {"CPU per element read": {}, "CPU per product": {}}
        for figure in json.loads(path.read_text(encoding="utf-8"))["figures"]:
            method, _, what = figure["name"].partition(": ")
            found[what][method] = figure["value"]
        return Rates(found["CPU per element read"], found["CPU per product"])


def cpu_seconds(method: str, work: Work, rates: Rates) -> Cpu:
    """Processor time of a merge by one method.

    Tensors that a method of whole matrices does not factor cost what they cost with `task_arithmetic`.

    Examples
    --------
    >>> cpu_seconds("ties", Work(0, 0, 10**9, 0.0), Rates({"ties": 5.0, "task_arithmetic": 2.0}, {}))
    Cpu(elements=5.0, products=0.0)
    """
    element = rates.element.get(method, rates.element["task_arithmetic"])
    return Cpu(work.elements * element / 1e9, work.products * rates.product.get(method, 0.0) / 1e9)


def seconds(work: Work, cpu: Cpu, machine: Machine) -> Times:
    """How long a merge takes on a machine that does nothing else.

    Examples
    --------
    >>> slow = Machine("slow", read=100.0, write=50.0, processors=2)
    >>> seconds(Work(read=1000, written=100, elements=0, products=0.0), Cpu(10.0, 0.0), slow)
    Times(disk=12.0, arithmetic=5.0, whole=14.0)
    """
    disk = work.read / machine.read + work.written / machine.write
    matrices = min(machine.processors, max(1, work.matrices))
    arithmetic = cpu.elements / machine.processors + cpu.products / matrices
    return Times(disk, arithmetic, START_UP_S + max(disk, arithmetic))
