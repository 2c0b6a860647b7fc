"""What must not change a byte of the output, and what must.

Chunk size, worker count, memory ceiling and the kind of store are how a merge is done; the output is what is done. The
checkpoints here are made of shapes that divide badly: a row wider than a small chunk, prime sizes, one dimension, none,
an empty tensor, a 3-D stack of experts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import mergepipe
from mergepipe.errors import Interrupted
from mergepipe.pipeline.events import Event, UnitFinished
from mergepipe.pipeline.reading import ReaderKind
from mergepipe.tasks import fusion_guess, guess, nodes
from mergepipe.tasks.breadcrumbs import kept_ranks
from mergepipe.tasks.listed import Listed, Room
from mergepipe.tasks.registry import METHODS, SPARSIFIERS

SHAPES = {
    "embed.weight": (211, 64),
    "layers.0.wide.weight": (3, 70_001),
    "layers.0.proj.weight": (97, 131),
    "layers.1.experts.weight": (4, 32, 33),
    "layers.1.norm.weight": (61,),
    "layers.1.scale": (),
    "layers.1.empty": (0, 16),
}

NARROW_ONLY: dict[str, Any] = {"match": "wide", "merge_method": "task_arithmetic", "sparsify": "none"}
"""A rule for `della`, which ranks whole rows and takes none as wide as the widest here."""

PARAMETERS: dict[str, Any] = {"weight": 0.4, "density": 0.5, "t": 0.3}
"""One value for every parameter that some method requires."""


def write_model(folder: Path, seed: int, parent: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor]:
    """A base, or a fine-tune of `parent`, in bfloat16; half of its shapes are halved in float32."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        value = torch.randn(shape, generator=generator) * (0.02 if parent is None else 0.002)
        dtype = torch.float32 if number % 3 == 2 else torch.bfloat16
        tensors[name] = (value if parent is None else parent[name].float() + value).to(dtype)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"architectures": ["Tiny"], "model_type": "tiny"}))
    return tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three fine-tunes of it."""
    folder = tmp_path_factory.mktemp("models")
    base = write_model(folder / "base", 0, None)
    (folder / "importances").mkdir()
    for seed in (1, 2, 3):
        write_model(folder / f"expert-{seed}", seed, base)
        found = write_model(folder / "importances" / f"expert-{seed}", 10 + seed, None)
        squares = {name: value**2 for name, value in found.items()}
        save_file(squares, folder / "importances" / f"expert-{seed}" / "model.safetensors", {"format": "pt"})
    return [folder / "base", *(folder / f"expert-{seed}" for seed in (1, 2, 3))]


def recipe_for(name: str, models: list[Path]) -> dict[str, Any]:
    """A recipe for a method, with as many models as it takes and a value for everything it requires."""
    method = METHODS[name]
    count = min(method.max_models or 3, 3)
    known = {parameter.name: parameter for parameter in method.parameters}
    shared = {key: value for key, value in PARAMETERS.items() if key in known and not known[key].without_effect}
    recipe: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(path)} for path in models[1 : count + 1]],
        "parameters": shared,
    }
    if method.base != "ignored":
        recipe["base_model"] = str(models[0])
    if "della" in name:
        recipe["rules"] = [NARROW_ONLY]
    if method.importance:
        for entry in recipe["models"]:
            entry["importance"] = str(models[0].parent / "importances" / Path(entry["model"]).name)
    return recipe


def merge(
    recipe: dict[str, Any], folder: Path, workers: int = 1, reader: ReaderKind = "auto", **how: Any
) -> dict[str, str]:
    """Build and run; the SHA-256 of every weight file of the output."""
    folder.mkdir(parents=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    mergepipe.build(path, work=folder / "work", out=folder / "merged", **how)
    mergepipe.run(folder / "work", workers=workers, reader=reader)
    return hashes(folder / "merged")


def hashes(merged: Path) -> dict[str, str]:
    """File name to SHA-256 of the weight files of an output."""
    files = sorted(merged.glob("*.safetensors"))
    assert files, f"no weights in {merged}"
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("name", sorted(name for name in METHODS if METHODS[name].takes == "models"))
def test_chunks_workers_and_stores_do_not_show(name: str, models: list[Path], tmp_path: Path) -> None:
    """Every method: small chunks, large chunks, one worker, several, a copied store, mapped files: the same bytes."""
    recipe = recipe_for(name, models)
    expected = merge(recipe, tmp_path / "plain")
    assert merge(recipe, tmp_path / "small", workers=3, chunk_size="4KiB") == expected
    assert merge(recipe, tmp_path / "odd", workers=2, chunk_size=70_001, reader="direct") == expected
    assert merge(recipe, tmp_path / "copy", workers=2, chunk_size="64KiB", store="copy", reader="direct") == expected
    assert merge(recipe, tmp_path / "mmap", reader="mmap") == expected


@pytest.mark.parametrize("sparsify", sorted(set(SPARSIFIERS) - {"none"}))
def test_every_sparsifier_too(sparsify: str, models: list[Path], tmp_path: Path) -> None:
    """Thresholds are properties of a tensor, not of how it is cut."""
    recipe = recipe_for("task_arithmetic", models)
    if sparsify == "della":
        recipe["rules"] = [NARROW_ONLY]
    declared = {parameter.name for parameter in SPARSIFIERS[sparsify].parameters}
    recipe["sparsify"] = {"method": sparsify, **({"density": 0.3} if "density" in declared else {})}
    expected = merge(recipe, tmp_path / "plain")
    assert merge(recipe, tmp_path / "small", workers=3, chunk_size="4KiB") == expected


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    chunk_kib=st.integers(1, 600),
    workers=st.integers(1, 4),
    ceiling=st.sampled_from(["512MiB", "1GiB", "3GiB"]),
    reader=st.sampled_from(["mmap", "direct"]),
)
def test_any_chunk_any_worker_any_ceiling(
    models: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
    chunk_kib: int,
    workers: int,
    ceiling: str,
    reader: ReaderKind,
) -> None:
    """TIES, which has the most sweeps, however it is cut."""
    recipe = recipe_for("ties", models)
    folder = tmp_path_factory.mktemp("any")
    found = merge(recipe, folder / "any", workers=workers, reader=reader, chunk_size=f"{chunk_kib}KiB", memory=ceiling)
    assert found == merge(recipe, folder / "plain")


def test_the_order_of_models_shows_only_where_weights_do(models: list[Path], tmp_path: Path) -> None:
    """Model order may change last bits of a float sum, never more."""
    recipe = recipe_for("task_arithmetic", models)
    turned = {**recipe, "models": recipe["models"][::-1]}
    merge(recipe, tmp_path / "one")
    merge(turned, tmp_path / "other")
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / side / "merged" / "model.safetensors") for side in ("one", "other"))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=2**-7, atol=1e-6)


def test_a_run_reads_what_the_manifest_says(models: list[Path], tmp_path: Path) -> None:
    """One entry of the saved chunk manifest is pointed elsewhere, and the run follows it there."""
    recipe = {"merge_method": "linear", "models": [{"model": str(models[1]), "parameters": {"weight": 1}}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    mergepipe.build(path, work=tmp_path / "work", out=tmp_path / "merged")
    (saved,) = (tmp_path / "work").rglob("manifest.json")
    turn_rows(saved)
    mergepipe.run(tmp_path / "work")
    from safetensors.torch import load_file

    before = load_file(models[1] / "model.safetensors")["layers.1.norm.weight"]
    after = load_file(tmp_path / "merged" / "model.safetensors")["layers.1.norm.weight"]
    assert not torch.equal(after, before)
    elsewhere = load_file(models[1] / "model.safetensors")["embed.weight"].flatten()[: before.numel()]
    assert torch.equal(after, elsewhere)


def turn_rows(saved: Path) -> None:
    """Point the one chunk of ``layers.1.norm.weight`` at the first bytes of ``embed.weight``."""
    manifest = json.loads(saved.read_text(encoding="utf-8"))
    arrays = manifest["arrays"]
    arrays["layers.1.norm.weight"]["offsets"] = arrays["embed.weight"]["offsets"][:1]
    saved.write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("how", [{}, {"chunk_size": "256KiB"}, {"reader": "direct", "memory": "288MiB"}])
@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties"])
def test_a_guess_does_not_show(
    method: str, how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds of bfloat16 tensors large enough to be guessed: held, cut small, or read anew for each sweep."""
    torch.manual_seed(0)
    base = {"w": torch.randn(1536, 1024) * 0.02}
    paths = [tmp_path / name for name in ("base", "one", "two")]
    for number, path in enumerate(paths):
        path.mkdir()
        noise = torch.randn(1536, 1024) * (0.001 * number)
        save_file({"w": (base["w"] + noise).bfloat16()}, path / "model.safetensors", {"format": "pt"})
    recipe = recipe_for(method, paths)
    found = merge(recipe, tmp_path / "guessed", **how)
    assert not (tmp_path / "guessed" / "work" / "statistics" / "histogram").exists(), "the guess was right"
    monkeypatch.setattr(guess, "SMALLEST", 1 << 40)
    assert found == merge(recipe, tmp_path / "sure")


@pytest.mark.parametrize("how", [{}, {"chunk_size": "256KiB", "workers": 3}, {"reader": "direct"}])
def test_a_guess_at_scores_does_not_show(how: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor in what the manifest says of the tensors; of one that can't be held, whose rows have moved unlike."""
    torch.manual_seed(0)
    base = torch.randn(2048, 1024) * 0.02
    paths = [tmp_path / name for name in ("base", "one", "two")]
    for number, path in enumerate(paths):
        path.mkdir()
        noise = torch.randn(2048, 1024) * torch.exp(torch.randn(2048, 1) / 10) * (0.001 * number)
        save_file({"w": (base + noise).bfloat16()}, path / "model.safetensors", {"format": "pt"})
    recipe = recipe_for("scf_rkl", paths)
    if "reader" in how:
        monkeypatch.setattr("mergepipe.pipeline.reading.pool_bytes", lambda scheduled: 2**22)
        how = {**how, "chunk_size": "512KiB"}
    monkeypatch.setattr("mergepipe.pipeline.schedule.RESIDENT_SHARE", 1 << 40)
    monkeypatch.setattr(fusion_guess, "FEWEST_BLOCKS", 1 << 40)
    sure = merge(recipe, tmp_path / "sure", **how)
    monkeypatch.setattr(fusion_guess, "FEWEST_BLOCKS", 32)
    for module in (fusion_guess, nodes):
        monkeypatch.setattr(module, "sampled_every", lambda blocks: 2)
    swept, rooms = [], []
    monkeypatch.setattr(nodes, "Listed", lambda *of: swept.append(of) or Listed(*of))
    monkeypatch.setattr("mergepipe.pipeline.execution.Room", lambda numbers: rooms.append(Room(numbers)) or rooms[-1])
    assert merge(recipe, tmp_path / "guessed", **how) == sure
    assert len(swept) == 1, "the guess was right"
    most = 2 * (2048 * 1024 // 128 + 64 * 2048)
    assert rooms[0].take(most), "the list has given its room back"
    assert not rooms[0].take(1)
    found, expected = (
        json.loads((tmp_path / name / "merged" / "mergepipe_manifest.json").read_text()) for name in ("guessed", "sure")
    )
    assert found["tensors"] == expected["tensors"]
    if "reader" in how:
        assert found["disk_bytes_read"] < expected["disk_bytes_read"], "three reads became two and a half"


def test_a_guess_at_scores_is_made_again_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever sweep it comes in: what is listed is kept nowhere."""
    torch.manual_seed(0)
    base = torch.randn(2048, 1024) * 0.02
    paths = [tmp_path / name for name in ("base", "one")]
    for number, path in enumerate(paths):
        path.mkdir()
        noise = torch.randn(2048, 1024) * (0.001 * number)
        save_file({"w": (base + noise).bfloat16()}, path / "model.safetensors", {"format": "pt"})
    recipe = recipe_for("scf_rkl", paths)
    sure = merge(recipe, tmp_path / "sure")
    monkeypatch.setattr("mergepipe.pipeline.schedule.RESIDENT_SHARE", 1 << 40)
    monkeypatch.setattr(fusion_guess, "FEWEST_BLOCKS", 32)
    for module in (fusion_guess, nodes):
        monkeypatch.setattr(module, "sampled_every", lambda blocks: 2)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged", chunk_size="512KiB")
    seen, stopped = [], 0
    for units in (3, 10, 20, 4):
        stop, left = threading.Event(), iter(range(units))

        def end(event: Event, stop: threading.Event = stop, left: Iterator[int] = left) -> None:
            if isinstance(event, UnitFinished):
                seen.append(event.stage)
                if next(left, None) is None:
                    stop.set()

        with contextlib.suppress(Interrupted):
            mergepipe.run(tmp_path / "work", workers=1, stop=stop, on_event=end)
            break
        stopped += 1
    mergepipe.run(tmp_path / "work")
    assert stopped == 4
    assert set(seen) >= {"sample", "row divergence", "apply"}
    assert hashes(tmp_path / "merged") == sure


@pytest.mark.parametrize("chunk_size", ["256KiB", "8MiB"])
@pytest.mark.parametrize("rows", [256, 1024])
def test_a_difference_beyond_float32_spoils_no_threshold(rows: int, chunk_size: str, tmp_path: Path) -> None:
    """It is for the general way, after some of its unit was counted from stored bits; and then dropped for its size."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, 1024, generator=generator) / 1000
    tuned = base + torch.randn(rows, 1024, generator=generator) / 1000
    near_zero = torch.rand(rows, 1024, generator=generator) < 0.02
    base, tuned = torch.where(near_zero, base * 1e-7, base), torch.where(near_zero, tuned - base, tuned)
    base[rows // 2, 5], tuned[rows // 2, 5] = 3e38, -3e38
    stored = [value.to(torch.bfloat16) for value in (base, tuned)]
    for name, value in zip(("base", "tuned"), stored, strict=True):
        (tmp_path / name).mkdir()
        save_file({"a.weight": value}, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_text("{}")
    model = {"model": str(tmp_path / "tuned"), "parameters": {"weight": 1.0, "density": 0.5, "gamma": 0.01}}
    recipe = {"merge_method": "breadcrumbs", "base_model": str(tmp_path / "base"), "models": [model]}
    merge(recipe, tmp_path / "job", chunk_size=chunk_size)
    below, above = (value.to(torch.float32) for value in stored)
    sizes = (above - below).abs().flatten()
    ordered = sizes.sort().values
    first, last = kept_ranks(0.5, 0.01, sizes.numel())
    kept = (sizes >= ordered[first]) & (sizes <= ordered[last])
    found = load_file(tmp_path / "job" / "merged" / "model.safetensors")["a.weight"].float().flatten()
    expected = torch.where(kept, (below + (above - below)).flatten(), below.flatten())
    assert torch.equal(found, expected.to(torch.bfloat16).float())
