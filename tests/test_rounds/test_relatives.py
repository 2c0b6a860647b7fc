"""Consensus, PCB and EMR through files, against float64 references; masks, and the models they bring back."""

from __future__ import annotations

import json
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import mergepipe
from mergepipe.errors import CheckpointNotFoundError, InputChangedError, Interrupted, WorkspaceError
from mergepipe.pipeline.events import UnitFinished
from mergepipe.pipeline.materialize import materialize
from mergepipe.storage.bits import MaskWriter, mask_layout, unpack
from mergepipe.storage.readers import MmapReader
from mergepipe.tasks.whole_select import ordered_keys, values_of
from support import whole
from support.drive import merge


def halves(values: Any) -> Any:
    """Exact in float32, also summed up."""
    return np.asarray(values, "f8") / 8


@given(
    data=st.data(),
    least=st.integers(0, 4),
    lam=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    dis_sum=st.booleans(),
    work=st.sampled_from(["f4", "f8"]),
)
def test_consensus_against_reference(data: Any, least: int, lam: float, dis_sum: bool, work: str) -> None:
    models = data.draw(st.integers(1, 4))
    few = st.integers(-9, 9).map(float)
    taus = [halves(data.draw(hnp.arrays("f8", (13,), elements=few))) for _ in range(models)]
    base = halves(data.draw(hnp.arrays("f8", (13,), elements=few)))
    params = {"min_active": least, "merged": "dis_sum" if dis_sum else "sum", "lambda": 0.5}
    each = [{"mask_lambda": lam}] * models
    found = merge("consensus", [(base + t).astype(work) for t in taus], base.astype(work), each, params).out
    np.testing.assert_array_equal(found, whole.consensus(base, taus, [lam] * models, least, 0.5, dis_sum))
    if least == 0 and not dis_sum:
        np.testing.assert_array_equal(found, base + 0.5 * sum(taus))  # task arithmetic
    if least > models:
        np.testing.assert_array_equal(found, base)  # zero-shot


def test_consensus_by_hand() -> None:
    """Two tasks want the first element, one the second, none can have the third."""
    taus = [np.array([[1.0, 4.0, 1.0]]), np.array([[1.0, 0.125, -1.0]])]
    base = np.zeros((1, 3))
    for least, expected in [(0, [2, 4.125, 0]), (1, [2, 4.125, 0]), (2, [2, 0, 0]), (3, [0, 0, 0])]:
        found = merge("consensus", taus, base, params={"min_active": least}).out
        np.testing.assert_array_equal(found, [expected])


def test_consensus_through_files(tmp_path: Path) -> None:
    base, experts = whole.family(6)
    found = whole.merged(tmp_path, base, experts, {"merge_method": "consensus", "parameters": {"mask_lambda": 0.5}})
    for name, value in base.items():
        expected = whole.consensus(value, [e[name] - value for e in experts], [0.5] * 3)
        np.testing.assert_array_equal(found[name], expected.astype("f4"))


@given(hnp.arrays(np.float32, 9, elements=st.floats(-(2.0**90), 2.0**90, width=32)))
def test_keys_order_as_values_do(values: Any) -> None:
    keys = ordered_keys(values).astype(np.int64)
    np.testing.assert_array_equal(values_of(keys, np.dtype("f4")), values.astype("f8"))
    order = np.argsort(keys, kind="stable")
    assert (np.diff(values[order]) >= 0).all()


def spread(seed: int, shapes: dict[str, tuple[int, ...]] = whole.SHAPES) -> tuple[whole.Model, list[whole.Model]]:
    """Models without ties, in float32 exactly."""
    rng = np.random.default_rng(seed)
    base = {name: rng.normal(0, 1, shape).astype("f4").astype("f8") for name, shape in shapes.items()}
    experts = [
        {name: (base[name] + rng.normal(0, 0.5, shape)).astype("f4").astype("f8") for name, shape in shapes.items()}
        for _ in range(3)
    ]
    return base, experts


@pytest.mark.parametrize("ratio", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("dtypes", ["float32", "float64"])
def test_pcb_through_files(tmp_path: Path, dtypes: str, ratio: float) -> None:
    base, experts = spread(7)
    recipe = {"merge_method": "pcb", "parameters": {"pcb_ratio": ratio, "lambda": 1.2}}
    found = whole.merged(tmp_path, base, experts, recipe, dtypes=dtypes)
    kind = "f4" if dtypes == "float32" else "f8"
    below = whole.flat(base).astype(kind)
    taus = [(whole.flat(expert).astype(kind) - below).astype("f8") for expert in experts]
    expected = whole.pcb(whole.flat(base), taus, ratio, 1.2, kind)
    np.testing.assert_allclose(whole.flat(found), expected, rtol=1e-5 if kind == "f4" else 1e-12, atol=1e-6)
    if ratio == 0.1:
        assert np.mean(whole.flat(found) == whole.flat(base)) > 0.3


def test_pcb_of_one_magnitude() -> None:
    """Nothing to scale: every element of the elected sign weighs the same."""
    base, experts = {"a": np.zeros(6)}, [{"a": np.array([1.0, -1, 1, 1, -1, 1])}] * 2
    expected = whole.pcb(base["a"], [e["a"] for e in experts], 0.5)
    np.testing.assert_allclose(expected, [1, -1, 1, 1, -1, 1])


def test_pcb_of_one_magnitude_through_files(tmp_path: Path) -> None:
    base, experts = {"a": np.zeros(6)}, [{"a": np.array([1.0, -1, 1, 1, -1, 1])}] * 2
    found = whole.merged(tmp_path, base, experts, {"merge_method": "pcb", "parameters": {"pcb_ratio": 0.5}})
    np.testing.assert_array_equal(found["a"], [1, -1, 1, 1, -1, 1])


EMR = {"merge_method": "emr_unified"}


@pytest.mark.parametrize("means", [False, True])
@pytest.mark.parametrize("dtypes", ["float32", "float64", "bfloat16"])
def test_emr_and_its_tasks(tmp_path: Path, dtypes: str, means: bool) -> None:
    base, experts = whole.family(8)
    recipe = {**EMR, "parameters": {"rescaler": "tensor_means" if means else "elements"}}
    found = whole.merged(tmp_path, base, experts, recipe, dtypes=dtypes)
    unified, tasks, factors = whole.emr(base, experts, means)
    for name in base:
        np.testing.assert_array_equal(found[name], unified[name], err_msg=name)
    for k, expected in enumerate(tasks):
        out = materialize(tmp_path / "merged", task=f"expert-{k}", out=tmp_path / f"task-{k}")
        values = whole.read(out)
        assert (out / "config.json").exists()
        for name in base:
            tolerance = {"float32": 1e-6, "float64": 1e-13, "bfloat16": 2**-8}[dtypes]
            np.testing.assert_allclose(values[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)
    assert all(factor > 0 for factor in factors)


def test_emr_of_one_task_is_that_task(tmp_path: Path) -> None:
    base, experts = whole.family(9, models=1)
    found = whole.merged(tmp_path, base, experts, EMR)
    task = whole.read(materialize(tmp_path / "merged", task="expert-0", out=tmp_path / "task"))
    for name in base:
        np.testing.assert_array_equal(found[name], experts[0][name])
        np.testing.assert_array_equal(task[name], experts[0][name])


def mask_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a merge but the one that tells of time."""
    files = sorted(path for path in (folder / "merged").rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder / "merged")): path.read_bytes()
        for path in files
        if path.name != "mergepipe_manifest.json"
    }


def test_masks_survive_any_interruption(tmp_path: Path) -> None:
    base, experts = whole.family(10, shapes={"a": (40_000,), "b": (7, 30_001), "c": (3,), "d": ()})
    straight = tmp_path / "straight"
    whole.merged(straight, base, experts, EMR)
    expected = mask_bytes(straight)
    assert {"tasks/expert-0/masks.safetensors", "model.safetensors"} <= expected.keys()
    folder, lives = tmp_path / "stopped", 0
    # The inputs are the very same, so that nothing but the way differs.
    shutil.copytree(straight, folder, ignore=shutil.ignore_patterns("work", "merged"))
    mergepipe.build(
        straight / "recipe.yaml", work=folder / "work", out=folder / "merged", memory="3GiB", chunk_size="64KiB"
    )
    while True:
        stop, seen = threading.Event(), [0]

        def listen(event: object, stop: threading.Event = stop, seen: list[int] = seen, after: int = 3 + lives) -> None:
            seen[0] += isinstance(event, UnitFinished)
            if seen[0] >= after:
                stop.set()

        try:
            mergepipe.run(folder / "work", workers=1 + lives % 3, on_event=listen, stop=stop)
            break
        except Interrupted:
            lives += 1
    assert lives > 2
    assert mask_bytes(folder) == expected


def test_masks_that_are_gone_are_noticed(tmp_path: Path) -> None:
    base, experts = whole.family(11)
    whole.prepare(tmp_path, base, experts, EMR)
    stop = threading.Event()

    def listen(event: object) -> None:
        if isinstance(event, UnitFinished) and event.stage == "apply":
            stop.set()

    with pytest.raises(Interrupted):
        mergepipe.run(tmp_path / "work", workers=1, on_event=listen, stop=stop)
    shutil.rmtree(tmp_path / "merged" / "tasks")
    with pytest.raises(WorkspaceError, match="masks"):
        mergepipe.run(tmp_path / "work")
    mergepipe.run(tmp_path / "work", restart=True)


def test_what_materialize_refuses(tmp_path: Path) -> None:
    base, experts = whole.family(12, shapes={"a": (50,)})
    whole.merged(tmp_path, base, experts, EMR)
    with pytest.raises(CheckpointNotFoundError, match="expert-0, expert-1, expert-2"):
        materialize(tmp_path / "merged", task="expert-9", out=tmp_path / "x")
    shutil.move(tmp_path / "base", tmp_path / "elsewhere")
    with pytest.raises(CheckpointNotFoundError, match="--base"):
        materialize(tmp_path / "merged", task="expert-0", out=tmp_path / "x")
    materialize(tmp_path / "merged", task="expert-0", out=tmp_path / "x", base=tmp_path / "elsewhere")
    whole.write(tmp_path / "base", {"a": base["a"] + 1})
    with pytest.raises(InputChangedError, match="changed"):
        materialize(tmp_path / "merged", task="expert-0", out=tmp_path / "y")


@pytest.mark.parametrize("restored", [False, True])
@pytest.mark.parametrize("name", ["merged/model.safetensors", "merged/tasks/expert-0/masks.safetensors", "base"])
def test_an_input_of_materialize_that_changes_while_it_is_read(
    name: str, restored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = whole.family(12, shapes={"a": (50,), "b": (60,)})
    whole.merged(tmp_path, base, experts, EMR)
    path = tmp_path / name
    path = next(path.glob("*.safetensors")) if path.is_dir() else path
    data, status, window, reads = path.read_bytes(), path.stat(), MmapReader.window, [0]

    def disturbed(*args: Any, **how: Any) -> Any:
        reads[0] += 1
        if reads[0] == 2:
            path.write_bytes(data[:-8] + bytes(8))
        if reads[0] == 3 and restored:
            path.write_bytes(data)
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return window(*args, **how)

    monkeypatch.setattr(MmapReader, "window", disturbed)
    with pytest.raises(InputChangedError, match=str(path)) as failure:
        materialize(tmp_path / "merged", task="expert-0", out=tmp_path / "x")
    assert failure.value.exit_code == 6
    assert not list((tmp_path / "x").glob("*.safetensors")), "nothing there looks whole"


@given(data=st.data(), size=st.integers(1, 70))
def test_bits_in_any_pieces(data: Any, size: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    bits = data.draw(hnp.arrays(bool, size))
    cuts = sorted({0, size, *data.draw(st.lists(st.integers(0, size), max_size=5))})
    pieces = data.draw(st.permutations(list(pairwise(cuts))))
    folder = tmp_path_factory.mktemp("bits") / "tasks" / "t"
    writer = MaskWriter(folder, mask_layout({"other": 3, "w": size}, {}))
    for start, stop in [*pieces, *pieces[:1]]:
        writer.write("w", start, bits[start:stop])
    writer.finish()
    from safetensors.numpy import load_file

    raw = load_file(folder / "masks.safetensors")
    np.testing.assert_array_equal(unpack(raw["w"], 0, size), bits)
    assert not raw["other"].any()


@pytest.mark.parametrize("method", ["pcb", "emr_unified", "consensus"])
def test_chunks_and_workers_change_no_byte(tmp_path: Path, method: str) -> None:
    base, experts = whole.family(13)
    folder = tmp_path / "models"
    recipe = {"merge_method": method, "sparsify": {"method": "tadrop", "target_density": 0.5}}
    found = []
    for chunk, workers in [("64KiB", 1), ("8MiB", 3)]:
        shutil.rmtree(folder, ignore_errors=True)
        whole.prepare(folder, base, experts, recipe, chunk_size=chunk)
        mergepipe.run(folder / "work", workers=workers)
        found.append(mask_bytes(folder))
    assert found[0] == found[1]


def test_the_manifest_names_what_was_done(tmp_path: Path) -> None:
    base, experts = whole.family(14, shapes={"a": (50,)})
    whole.merged(tmp_path, base, experts, EMR)
    assert (
        json.loads((tmp_path / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["method"]
        == "emr_unified"
    )
