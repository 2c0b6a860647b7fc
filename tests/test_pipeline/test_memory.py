"""The memory model, written once more with primes: each term counts what it says, and units shrink until all fit."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mergepipe
from mergepipe.errors import MemoryBudgetError, UsageError
from mergepipe.pipeline.machine import available_bytes, cpu_count
from mergepipe.pipeline.memory import (
    MIB,
    TENSORS_IN_FLIGHT,
    UNITS_BEHIND,
    Ceiling,
    TensorShape,
    UnitShape,
    accumulator_bytes,
    blocks_in,
    output_bytes,
    parse_bytes,
    projected_bytes,
)
from support.jobs import build_job, write_job, write_recipe

UNIT = UnitShape(
    elements=1009, inputs=3, input_itemsize=2, output_itemsize=4, work_itemsize=8, scratch_rows=5, gathered=False
)
BLOCK = 65_536


def test_each_term_counts() -> None:
    tiles = (3 + 1 + 5) * 1009 * 8
    assert projected_bytes(UNIT) == 1009 * 4 + tiles
    assert projected_bytes(replace(UNIT, gathered=True)) == 1009 * 3 * 2 + 1009 * 4 + tiles
    assert projected_bytes(replace(UNIT, elements=7 * BLOCK)) == 7 * BLOCK * 4 + (3 + 1 + 5) * BLOCK * 8
    assert output_bytes(UNIT) == 1009 * 4
    assert accumulator_bytes(TensorShape(counts=101, blocks=13), workers=7) == (7 + 1) * 101 * 8 + 13 * 8


@given(
    st.integers(1, 10**7),
    st.integers(1, 12),
    st.sampled_from([1, 2, 4, 8]),
    st.booleans(),
    st.integers(1, 64),
    st.integers(1, 500),
    st.integers(0, 10**6),
    st.integers(1, 4096),
)
def test_what_is_granted_fits(
    block: int, inputs: int, itemsize: int, gathered: bool, workers: int, wanted: int, counts: int, allowed_mib: int
) -> None:
    unit = UnitShape(block, inputs, itemsize, itemsize, 4, 2, gathered)
    kept = TensorShape(counts, 0)
    ceiling = Ceiling(allowed_mib * MIB, workers, reserved=128 * MIB)
    try:
        blocks = ceiling.blocks_per_unit(unit, kept, wanted, block, "w")
    except MemoryBudgetError as error:
        found = re.search(r"--memory (\d+)MiB", str(error))
        assert found
        told = int(found[1])
        assert told > allowed_mib
        assert replace(ceiling, allowed=told * MIB).blocks_per_unit(unit, kept, wanted, block, "w") >= 1
        with pytest.raises(MemoryBudgetError):
            replace(ceiling, allowed=(told - 1) * MIB).blocks_per_unit(unit, kept, wanted, block, "w")
        return
    assert 1 <= blocks <= wanted
    full = replace(unit, elements=blocks * block)
    behind = UNITS_BEHIND * output_bytes(full)
    need = workers * projected_bytes(full) + behind + TENSORS_IN_FLIGHT * accumulator_bytes(kept, workers)
    assert ceiling.projected(full, kept) == need + ceiling.reserved <= ceiling.allowed


def test_more_room_never_means_smaller_units() -> None:
    kept = TensorShape(0, 0)
    sizes = [Ceiling(mib * MIB, 4, 0).blocks_per_unit(UNIT, kept, 64, BLOCK, "w") for mib in range(30, 300, 10)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GiB", 2**33), ("5GB", 5 * 10**9), ("1.5k", 1500), (" 7 mib ", 7 * MIB), (11, 11), ("1Ti", 2**40)],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "GiB", "1 PiB", "1e9", "0.1", "8GiBs"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_bytes(text)


def test_the_machine() -> None:
    assert available_bytes() > 64 * MIB
    assert cpu_count() >= 1
    assert blocks_in(1, 8, BLOCK) == 1
    assert blocks_in(8 * MIB, 2, BLOCK) == 64


@pytest.mark.parametrize("store", ["virtual", "copy"])
def test_the_ceiling_that_is_told_does_for_all_tensors(store: Any, tmp_path: Path) -> None:
    """The first tensor that does not fit is not the one that needs most; copied ones have units of their own."""
    write_job(tmp_path, {"a": (4, 8), "m": (2048, 1024), "z": (4, 8)}, method="passthrough", models=1)
    write_recipe(tmp_path, "ties", models=1, rules=[{"match": "^m$", "merge_method": "passthrough"}])
    for allowed in ("1MiB", "256MiB"):
        with pytest.raises(MemoryBudgetError) as caught:
            build_job(tmp_path, memory=allowed, workers=3, store=store)
        found = re.search(r"--memory (\d+)MiB", str(caught.value))
        assert found
        with pytest.raises(MemoryBudgetError):
            build_job(tmp_path, memory=f"{int(found[1]) - 1}MiB", workers=3, store=store)
        work = build_job(tmp_path, memory=f"{found[1]}MiB", workers=3, store=store)
    mergepipe.run(work, workers=3)


def test_auto_maps_where_buffers_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`build` tells the smallest ceiling for mapped windows; a run that may choose must do with it."""
    monkeypatch.setattr("mergepipe.pipeline.reading.all_direct", lambda _: True)
    write_job(tmp_path, {"w": (512, 512)}, models=3)
    with pytest.raises(MemoryBudgetError) as caught:
        build_job(tmp_path, memory="1MiB", workers=2)
    found = re.search(r"--memory (\d+)MiB", str(caught.value))
    assert found
    work = build_job(tmp_path, memory=f"{found[1]}MiB", workers=2)
    with pytest.raises(MemoryBudgetError):
        mergepipe.run(work, workers=2, reader="direct")
    mergepipe.run(work, workers=2)
