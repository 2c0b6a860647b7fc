"""`unstack_3d`: a stack of matrices thinned as if each matrix were a tensor of its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import RecipeError
from mergepipe.tasks.blocks import block_bounds, block_count
from mergepipe.tasks.method import Accumulator, State, Tile, expected_reads, lasting
from mergepipe.tasks.registry import SPARSIFIERS
from mergepipe.tasks.slices import most_slices, pieces, slice_job
from support import whole
from support.drive import make_job, merge

STACKS = [(4, 6, 5), (3, 40, 1000), (2, 3, 70_001), (5, 300, 700), (1, 2, 3), (70, 31, 61)]
"""Many slices in a block, blocks over the ends of slices, rows of several blocks, one slice."""


@given(st.one_of(st.sampled_from(STACKS), st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(1, 3000))))
def test_pieces_cover_a_stack_once(shape: tuple[int, int, int]) -> None:
    _, job = make_job("task_arithmetic", shape, "f4", [{"weight": 1}])
    one, size = slice_job(job), shape[1] * shape[2]
    seen: dict[int, list[tuple[int, int, int]]] = {}
    for block in range(block_count(shape)):
        start = block_bounds(shape, block)[0]
        for piece in pieces(job, block):
            assert piece.place < most_slices(job)
            assert piece.index < one.blocks
            seen.setdefault(piece.of, []).append((start + piece.start, start + piece.stop, piece.index))
    assert sorted(seen) == list(range(shape[0]))
    for number, found in seen.items():
        bounds = sorted(found)
        assert bounds[0][0] == number * size
        assert bounds[-1][1] == (number + 1) * size
        assert all(a[1] == b[0] and a[2] + 1 == b[2] for a, b in pairwise(bounds))


@pytest.mark.parametrize("shape", STACKS)
@pytest.mark.parametrize(
    "options",
    [{}, {"tie_rule": "index", "rescale": "l2"}, {"metric": "l1l2", "rescale": "l1"}, {"s_slope": 0.0}],
    ids=["plain", "index", "l1l2", "nothing dropped"],
)
def test_slices_are_tensors(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    """Slice by slice, bit for bit what the same matrices alone come to, whatever the order and the workers."""
    rng = np.random.default_rng(0)
    taus = [
        whole.grid(rng, shape, spread=3.0).astype("f4") * (1 + np.arange(shape[0]).reshape(-1, 1, 1)).astype("f4")
        for _ in range(2)
    ]
    taus[0][0] = 0
    base = np.zeros(shape, "f4")
    sparsify = {"method": "tadrop", "unstack_3d": True, **options}
    each = [{"weight": 1.0}, {"weight": 0.5}]
    whole_stack = merge("ties", taus, base, each, sparsify=sparsify, workers=2, order=1)
    for e in range(shape[0]):
        alone = merge("ties", [t[e].copy() for t in taus], base[e], each, sparsify={**sparsify, "unstack_3d": False})
        np.testing.assert_allclose(whole_stack.out[e], alone.out, rtol=1e-6, err_msg=str(e))
    again = merge("ties", taus, base, each, sparsify=sparsify)
    np.testing.assert_array_equal(again.out, whole_stack.out)
    together = merge("ties", taus, base, each, sparsify={**sparsify, "unstack_3d": False})
    if shape[0] > 2 and "tie_rule" in options:
        assert not np.array_equal(together.out, whole_stack.out)


def unstacked(model: whole.Model, name: str) -> whole.Model:
    """The same model with each matrix of a stack as a tensor."""
    rest = {key: value for key, value in model.items() if key != name}
    return rest | {f"{name}.{e}": matrix for e, matrix in enumerate(model[name])}


@pytest.mark.parametrize("target", [None, 0.4])
@pytest.mark.parametrize("host", ["task_arithmetic", "ties", "sce"])
def test_through_files(tmp_path: Path, host: str, target: float | None) -> None:
    """The merge of stacks is the merge of models that hold the matrices one by one; also for a target over all."""
    shapes = {"experts": (5, 300, 90), "embed": (37, 11), "norm": (23,), "empty": (0, 3, 4)}
    base, experts = whole.family(20, models=2, shapes=shapes)
    sparsify = {"method": "tadrop", "tie_rule": "index", "unstack_3d": True, "metric": "l1l2"}
    sparsify |= {"target_density": target} if target else {}
    weight = {} if host == "sce" else {"parameters": {"weight": 1.0}}
    recipe = {"merge_method": host, "sparsify": sparsify, **weight}
    stack = whole.merged(tmp_path / "stack", base, experts, recipe)
    ones = [unstacked(model, "experts") for model in (base, *experts)]
    alone = whole.merged(tmp_path / "ones", ones[0], ones[1:], recipe)
    np.testing.assert_array_equal(stack["embed"], alone["embed"])
    if host != "sce":  # which weighs models tensor by tensor
        for name, value in unstacked(stack, "experts").items():
            np.testing.assert_array_equal(value, alone[name], err_msg=name)


def test_all_models_or_none(tmp_path: Path) -> None:
    base, experts = whole.family(0, models=2, shapes={"experts": (2, 3, 4)})
    sparsify = {"method": "tadrop", "unstack_3d": [{"filter": "other", "value": True}, {"value": False}]}
    recipe = {"merge_method": "task_arithmetic", "sparsify": sparsify, "parameters": {"weight": 1.0}}
    whole.prepare(tmp_path, base, experts, recipe)
    with pytest.raises(RecipeError, match="for all of them, or for none"):
        merge(
            "task_arithmetic",
            [model["experts"] for model in experts],
            base["experts"],
            [{"weight": 1.0}] * 2,
            sparsify=[{"method": "tadrop", "unstack_3d": flag} for flag in (True, False)],
        )


def test_large_slices_are_guessed_for_and_leave_little() -> None:
    """Two passes, of a sample of everything and near the thresholds; of histograms nothing is kept."""
    each = [{"method": "tadrop", "unstack_3d": True}]
    shape, rng = (2, 1024, 1024), np.random.default_rng(0)
    _, job = make_job("task_arithmetic", shape, "f4", [{"weight": 1.0}], sparsify=each)
    job = replace(job, halves=True)
    sweeps = SPARSIFIERS["tadrop"].reductions(job)
    assert expected_reads(sweeps, job) == 2
    values = whole.grid(rng, (1, 2 << 20), spread=3.0).astype("f4")
    state: State = {}
    made = []
    for sweep in sweeps:
        if not sweep.needed(job, state):
            continue
        made.append(sweep.name)
        counts, row = sweep.shapes(job)
        rows = None if row is None else np.zeros((job.blocks, *row))
        total = Accumulator(None if counts is None else np.zeros(counts, np.int64), rows)
        for block in range(job.blocks):
            start, stop = block_bounds(shape, block)
            own = np.ascontiguousarray(values[:, start:stop])
            sweep.update(job, state, total, Tile(block, start, None, own, own[:0]))
        state = {**state, **sweep.combine(job, state, total)}
    assert made == ["sample by slice", "counts near thresholds by slice"]
    assert sum(value.nbytes for value in lasting(state).values()) < 10_000
    for number in range(2):
        sizes = np.sort(np.abs(values[0, number << 20 : (number + 1) << 20]))
        assert state[f"_slice{number}_thresholds"][0] in sizes
