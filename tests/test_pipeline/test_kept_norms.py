"""``run --diagnostics``: what is kept of each task vector, on every kind of host, and whatever happens on the way."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import mergepipe
from mergepipe.errors import Interrupted, MemoryBudgetError
from mergepipe.pipeline import kept_norms
from mergepipe.pipeline.memory import MIB, Ceiling
from mergepipe.pipeline.plan import Plan
from mergepipe.storage.journal import read_journal
from mergepipe.storage.workspace import Workspace
from support.jobs import Shapes, write_job, write_recipe

SHAPES: Shapes = {
    "embed.weight": (300, 256),
    "layers.0.up.weight": (3, 66_001),
    "layers.0.norm.weight": (64,),
    "layers.1.scale": (),
    "layers.1.empty": (0, 16),
}
HALF = {"sparsify": {"method": "magnitude", "density": 0.5}}
Norms = dict[str, list[float]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_job(folder, SHAPES)
    return folder


def deltas(folder: Path, model: int) -> dict[str, Any]:
    base, own = (load_file(folder / name / "model.safetensors") for name in ("base", f"expert-{model}"))
    return {name: (own[name].astype("f4") - base[name].astype("f4")).astype("f8").ravel() for name in SHAPES}


def share(values: Any, least: float) -> float:
    return float(np.linalg.norm(values[abs(values) >= least]) / np.linalg.norm(values))


def expected(folder: Path, *, whole: bool = False) -> Norms:
    """Of the larger half of each tensor, or of the model."""
    found: Norms = {name: [] for name, shape in SHAPES.items() if 0 not in shape}
    for model in (1, 2):
        own = deltas(folder, model)
        for name, norms in found.items():
            sizes = np.sort(abs(np.concatenate(list(own.values())) if whole else abs(own[name])))
            norms.append(share(own[name], sizes[len(sizes) - max(1, len(sizes) // 2)]))
    return found


def build(models: Path, folder: Path, method: str, extra: dict[str, Any], **how: Any) -> Path:
    write_recipe(models, method, **extra)
    text = (models / "recipe.yaml").read_text()
    if method in ("consensus", "pcb", "emr_unified", "mda", "iso_c", "opcm"):
        text = "\n".join(x for x in text.splitlines() if "weight: 0.5" not in x and "  parameters:" not in x)
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(text)
    mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "out", **{"memory": "2GiB", **how})
    return folder / "work"


def norms_in(manifest: dict[str, Any]) -> Norms:
    return {name: own["kept_norms"] for name, own in manifest["tensors"].items() if "kept_norms" in own}


@pytest.mark.parametrize("method", ["ties", "consensus", "pcb", "emr_unified", "mda", "opcm"])
def test_of_every_kind_of_host(method: str, models: Path, tmp_path: Path) -> None:
    extra = {} if method == "ties" else HALF
    plain = mergepipe.run(build(models, tmp_path, method, extra)).manifest
    assert not norms_in(plain)
    result = mergepipe.run(tmp_path / "work", diagnostics=True)
    wanted = expected(models)
    found = norms_in(result.manifest)
    assert found.keys() == wanted.keys()
    for name, norms in wanted.items():
        assert found[name] == pytest.approx(norms, rel=1e-12), name
        assert result.manifest["tensors"][name]["device"]


def test_of_a_threshold_of_the_whole_model(models: Path, tmp_path: Path) -> None:
    extra = {"scope": "model", **HALF}
    found = norms_in(mergepipe.run(build(models, tmp_path, "task_arithmetic", extra), diagnostics=True).manifest)
    for name, norms in expected(models, whole=True).items():
        assert found[name] == pytest.approx(norms, rel=1e-12), name


def test_what_comes_by_the_way_is_not_measured_again(models: Path, tmp_path: Path) -> None:
    """A restored norm is measured in the merge; without it the numbers are the same ones, to the bit."""
    rescaled = {"sparsify": {**HALF["sparsify"], "rescale": True}}
    by_the_way = mergepipe.run(build(models, tmp_path / "a", "task_arithmetic", rescaled), diagnostics=True).manifest
    journal = read_journal(Workspace(tmp_path / "a" / "work").journal_file)
    assert not [record for record in journal if record["type"] == "kept"]
    measured = mergepipe.run(build(models, tmp_path / "b", "task_arithmetic", HALF), diagnostics=True).manifest
    assert norms_in(measured) == norms_in(by_the_way)
    assert len(norms_in(measured)) == 4


def test_no_cut_and_no_interruption_changes_a_bit(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = mergepipe.run(build(models, tmp_path / "once", "ties", {}), diagnostics=True, workers=3).manifest
    work = build(models, tmp_path / "again", "ties", {}, chunk_size="64KiB")
    keep = kept_norms.KeptSurvey._keep
    for allowed in (0, 1, 2, 100):
        left = [allowed]

        def one_more(self: Any, number: int, state: Any, left: list[int] = left) -> None:
            if not left[0]:
                self._drivers._stop.set()
                self._drivers.check_stop()
            left[0] -= 1
            keep(self, number, state)

        monkeypatch.setattr(kept_norms.KeptSurvey, "_keep", one_more)
        if allowed < 100:
            with pytest.raises(Interrupted, match="--diagnostics"):
                mergepipe.run(work, diagnostics=True, workers=1, stop=threading.Event())
        else:
            again = mergepipe.run(work, diagnostics=True, workers=1).manifest
    assert again["tensors"] == once["tensors"]
    records = read_journal(Workspace(work).journal_file)
    made = [record["tensor"] for record in records if record["type"] == "kept"]
    assert len(made) == len(set(made)) == 4


def test_without_the_journal_nobody_knows(models: Path, tmp_path: Path) -> None:
    work = build(models, tmp_path, "ties", {})
    mergepipe.run(work)
    Workspace(work).journal_file.unlink()
    notes: list[str] = []
    found = mergepipe.run(work, verify="none", diagnostics=True, on_event=lambda event: notes.append(str(event)))
    assert not norms_in(found.manifest)
    assert any("journal of the merge is gone" in note for note in notes)


def test_there_is_room_for_it_before_anything_runs(models: Path, tmp_path: Path) -> None:
    plan = Plan.from_json(Workspace(build(models, tmp_path, "ties", {})).read_plan())
    with pytest.raises(MemoryBudgetError, match=r"--memory \d+MiB"):
        kept_norms.cut(plan, Ceiling(100 * MIB, 2))
