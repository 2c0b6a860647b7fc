"""The model of cost: every method has its measured rate, and each term counts what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.cost import MACHINES, START_UP_S, Cpu, Machine, Rates, Work, cpu_seconds, seconds
from mergepipe.tasks.registry import METHODS

WORK = Work(read=6 * 10**9, written=2 * 10**9, elements=10**9, products=3e9)
SLOW = Machine("slow", read=1e9, write=0.5e9, processors=2)


def test_every_method_was_measured() -> None:
    rates = Rates.load()
    measured = {*rates.element, *rates.product}
    assert measured == {name for name, method in METHODS.items() if method.takes == "models"}
    assert all(0 < rate < 1000 for rate in (*rates.element.values(), *rates.product.values()))


def test_a_disk_or_the_processors_limit_a_run() -> None:
    assert seconds(WORK, Cpu(5.0, 0.0), SLOW).whole == START_UP_S + 6 + 4
    assert seconds(WORK, Cpu(50.0, 0.0), SLOW).whole == START_UP_S + 50 / 2
    assert seconds(WORK, Cpu(50.0, 0.0), replace(SLOW, processors=50)).whole == START_UP_S + 6 + 4
    for matrices, at_once in ((0, 1), (1, 1), (2, 2), (9, 2)):
        found = seconds(replace(WORK, matrices=matrices), Cpu(0.0, 50.0), SLOW)
        assert found.whole == START_UP_S + 50 / at_once
    assert [machine.name for machine in MACHINES] == ["laptop SSD", "NVMe workstation", "network disk"]


@pytest.mark.parametrize(("method", "expected"), [("ties", Cpu(4.0, 0.0)), ("tsv_m", Cpu(2.0, 1.5))])
def test_processor_time(method: str, expected: Cpu) -> None:
    rates = Rates({"ties": 4.0, "task_arithmetic": 2.0}, {"tsv_m": 0.5})
    assert cpu_seconds(method, WORK, rates) == expected
