"""The manifest's record of each tensor: against references, the same after an interruption, and no byte the worse."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

import mergepipe
from mergepipe.errors import Interrupted, MemoryBudgetError, UsageError
from mergepipe.pipeline.afterwards import Afterwards
from mergepipe.storage.journal import read_journal
from mergepipe.storage.workspace import Workspace
from support.jobs import Shapes, hashes, write_job, write_recipe

SHAPES: Shapes = {
    "embed.weight": (300, 256),
    "layers.0.up.weight": (3, 66_001),
    "layers.0.norm.weight": (64,),
    "layers.1.experts": (3, 5, 40),
    "layers.1.column.weight": (50, 1),
    "layers.1.scale": (),
    "layers.1.empty": (0, 16),
}


def build(folder: Path, name: str = "work", **how: Any) -> Path:
    mergepipe.build(folder / "recipe.yaml", work=folder / name, out=folder / f"{name}-out", **{"memory": "2GiB", **how})
    return folder / name


def job(folder: Path, method: str, shards: int = 1, **extra: Any) -> Path:
    write_job(folder, SHAPES, shards)
    write_recipe(folder, method, **extra)
    if method in ("scf_rkl", "mda", "emr_unified"):
        text = (folder / "recipe.yaml").read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if "weight: 0.5" not in line and "parameters:" not in line]
        (folder / "recipe.yaml").write_text("\n".join(lines if "parameters" not in extra else text.splitlines()))
    return folder


def entropies(rows: np.ndarray[Any, Any]) -> tuple[Any, Any]:
    log_p = rows - rows.max(-1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(-1, keepdims=True))
    return -(np.exp(log_p) * log_p).sum(-1), log_p


def expected_change(a: np.ndarray[Any, Any], w: np.ndarray[Any, Any]) -> dict[str, float]:
    """In extended precision, by the textbook."""
    a, w = (np.atleast_1d(v).astype(np.longdouble) for v in (a, w))
    (before, log_p), (after, log_q) = entropies(a), entropies(w)
    norm = float(np.sqrt(((w - a) ** 2).sum()))
    return {
        "norm": norm,
        "relative_norm": norm / float(np.sqrt((a**2).sum())),
        "row_kl": float((np.exp(log_q) * (log_q - log_p)).sum(-1).mean()),
        "entropy": float((after - before).mean()),
    }


@pytest.mark.parametrize("method", ["scf_rkl", "mda", "ties"])
def test_changes_against_the_textbook(method: str, tmp_path: Path) -> None:
    folder = job(tmp_path, method, shards=2 if method == "ties" else 1)
    how = {"shard_size": "300KB"} if method == "ties" else {}
    result = mergepipe.run(build(folder, **how), diagnostics=True, memory="2GiB")
    files = [load_file(path) for path in sorted((folder / "work-out").glob("*.safetensors"))]
    bases = [load_file(path) for path in sorted((folder / "base").glob("*.safetensors"))]
    merged, base = ({name: value for file in found for name, value in file.items()} for found in (files, bases))
    assert len(files) == (3 if method == "ties" else 1)
    records = {name: record["change"] for name, record in result.manifest["tensors"].items() if "change" in record}
    assert sorted(records) == sorted(name for name, shape in SHAPES.items() if 0 not in shape)
    for name, found in records.items():
        expected = expected_change(base[name], merged[name])
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-9, abs=1e-13), (name, key)
        if len(SHAPES[name]) != 2:
            assert "rotation" not in found
            continue
        singular = np.linalg.svd(base[name].astype("f8"), compute_uv=False)
        for k in (1, 4, 16, 64):
            if k >= len(singular):
                assert str(k) not in found["rotation"]
                continue
            bound = expected["norm"] / (singular[k - 1] - singular[k])
            assert found["rotation"][str(k)] == pytest.approx(bound, rel=1e-6)
    assert json.loads((folder / "work-out" / "mergepipe_manifest.json").read_text(encoding="utf-8"))[
        "tensors"
    ] == json.loads(json.dumps(result.manifest["tensors"]))


def test_small_changes_of_entropy_keep_their_digits() -> None:
    """A fine-tune's change is a millionth of the entropy: the difference of two entropies in float64 is noise."""
    from mergepipe.tasks import change
    from mergepipe.tasks.method import Accumulator, Job, Tile

    rng = np.random.default_rng(0)
    a = rng.normal(0, 0.02, (8, 4096)).astype("f4")
    w = a + (rng.normal(0, 1e-5, a.shape) * (rng.random(a.shape) < 0.1)).astype("f4")
    task = Job("w", a.shape, 1, np.dtype("f4"), {}, ({},))
    state: dict[str, Any] = {}
    for one in change.reductions(task):
        row = one.shapes(task)[1]
        assert row is not None
        total = Accumulator(None, np.zeros((task.blocks, *row)))
        tile = Tile(0, 0, a.ravel(), w.reshape(1, -1), np.empty((3, a.size), "f4"))
        one.update(task, state, total, tile)
        state |= one.combine(task, state, total)
    expected = expected_change(a, w)["entropy"]
    assert state["change"][3] == pytest.approx(expected, rel=1e-7)
    assert abs(expected) < 1e-6


@pytest.mark.parametrize(
    ("method", "extra"),
    [
        ("scf_rkl", {"scope": "model"}),
        ("mda", {"sparsify": {"method": "tadrop"}}),
        pytest.param("scf_rkl", {}, marks=pytest.mark.slow),
        pytest.param("emr_unified", {"sparsify": {"method": "tadrop"}}, marks=pytest.mark.slow),
    ],
    ids=["scf_rkl over the model", "mda", "scf_rkl", "emr_unified"],
)
def test_an_interruption_leaves_the_same_record(method: str, extra: dict[str, Any], tmp_path: Path) -> None:
    folder = job(tmp_path, method, **extra)
    expected = mergepipe.run(build(folder), diagnostics=True).manifest["tensors"]
    assert any("densities" in record for record in expected.values())
    assert all("change" in record for name, record in expected.items() if 0 not in SHAPES[name])
    work, stops = build(folder, "other"), 0
    for attempt in range(40):
        stop, count = threading.Event(), [0]

        def on_event(event: Any, stop: Any = stop, count: Any = count, limit: int = 3 + 5 * attempt) -> None:
            count[0] += type(event).__name__ in ("UnitFinished", "TensorFinished")
            if count[0] >= limit:
                stop.set()

        try:
            found = mergepipe.run(work, stop=stop, on_event=on_event, workers=1, diagnostics=True)
            break
        except Interrupted:
            stops += 1
    else:
        pytest.fail("made no progress")
    assert stops
    assert found.manifest["tensors"] == expected
    assert hashes(folder / "other-out") == hashes(folder / "work-out")


def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = job(tmp_path, "ties")
    plain = mergepipe.run(build(folder, "plain"))
    assert not any("change" in record for record in plain.manifest["tensors"].values())
    expected = mergepipe.run(build(folder, "whole"), diagnostics=True)
    assert hashes(folder / "plain-out") == hashes(folder / "whole-out")
    work, keep = build(folder), Afterwards.keep
    for allowed in (0, 2, 5, 100):
        left = [allowed]

        def one_more(self: Afterwards, record: dict[str, Any], left: list[int] = left) -> None:
            if not left[0]:
                self.drivers._stop.set()
                self.drivers.check_stop()
            left[0] -= 1
            keep(self, record)

        monkeypatch.setattr(Afterwards, "keep", one_more)
        if allowed < 100:
            with pytest.raises(Interrupted, match="--diagnostics"):
                mergepipe.run(work, diagnostics=True, workers=1)
            assert not (folder / "work-out" / "model.safetensors").exists()
        else:
            assert mergepipe.run(work, diagnostics=True).manifest["tensors"] == expected.manifest["tensors"]
    records = read_journal(Workspace(work).journal_file)
    made = [(one["type"], one["tensor"]) for one in records if one["type"] in ("change", "gaps")]
    assert len(made) == len(set(made)) == 6 + 3
    assert hashes(folder / "work-out") == hashes(folder / "plain-out")


def test_a_finished_merge_can_be_compared(tmp_path: Path) -> None:
    folder = job(tmp_path, "scf_rkl")
    work = build(folder)
    before = mergepipe.run(work).manifest
    bytes_before = hashes(folder / "work-out")
    found = mergepipe.run(work, diagnostics=True).manifest
    assert found["tensors"]["embed.weight"]["change"]["norm"] > 0
    stripped = {
        name: {key: value for key, value in record.items() if key != "change"}
        for name, record in found["tensors"].items()
    }
    assert {name: record for name, record in stripped.items() if record} == before["tensors"]
    assert hashes(folder / "work-out") == bytes_before
    assert mergepipe.run(work).manifest["tensors"] == json.loads(json.dumps(found["tensors"]))
    notes: list[str] = []
    mergepipe.run(work, diagnostics=True, on_event=lambda event: notes.append(str(getattr(event, "text", ""))))
    assert any("nothing to do" in note for note in notes)


def test_of_a_chain_the_result_is_compared(tmp_path: Path) -> None:
    """An earlier merge without a base is none of its business; what can't be done is said before anything runs."""
    write_job(tmp_path, SHAPES)
    experts = [{"model": str(tmp_path / f"expert-{number}")} for number in (1, 2)]
    mean = {"name": "mean", "merge_method": "linear", "models": experts, "parameters": {"weight": 1}}
    last = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": [{"model": "mean"}]}
    last["parameters"] = {"weight": 1, "density": 0.5}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump_all([mean, last]))
    work = build(tmp_path)
    with pytest.raises(UsageError, match="--on-shard"):
        mergepipe.run(work, diagnostics=True, on_shard="true {path}")
    assert not (work / "merged").exists()
    found = mergepipe.run(work, diagnostics=True).manifest["tensors"]
    assert found["embed.weight"]["change"]["norm"] > 0


def test_what_is_refused(tmp_path: Path) -> None:
    work = build(job(tmp_path / "one", "ties"))
    with pytest.raises(UsageError, match="--on-shard"):
        mergepipe.run(work, diagnostics=True, on_shard="true {path}")
    with pytest.raises(MemoryBudgetError, match=r"singular values of '.*--memory (\d+)MiB"):
        mergepipe.run(work, diagnostics=True, memory="420MiB")
    with pytest.raises(UsageError, match="'linear' was given none"):
        mergepipe.run(build(job(tmp_path / "two", "linear")), diagnostics=True)
    assert not (tmp_path / "one" / "work-out").exists()
