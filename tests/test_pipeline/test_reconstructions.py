"""A merge says which of the methods that made it are reconstructions, what is known of them, and what is our choice."""

from __future__ import annotations

from pathlib import Path

import pytest

import mergepipe
from mergepipe.tasks.registry import METHODS, SPARSIFIERS
from support.jobs import build_job, write_job


@pytest.mark.parametrize(
    ("method", "extra", "used"),
    [
        ("ties", {}, []),
        ("task_arithmetic", {"sparsify": "tadrop"}, ["tadrop"]),
        ("ties", {"rules": [{"match": "norm", "merge_method": "task_arithmetic", "sparsify": "tadrop"}]}, ["tadrop"]),
        ("mda", {"rules": [{"match": "up", "sparsify": "tadrop"}]}, ["mda", "tadrop"]),
        ("scf_rkl", {"parameters": {"quantile": 0.5}}, ["scf_rkl"]),
    ],
)
def test_reconstructions_are_told(method: str, extra: dict[str, object], used: list[str], tmp_path: Path) -> None:
    write_job(tmp_path, shapes={"up.weight": (8, 16), "norm.weight": (16,)}, method=method, **extra)
    if method in ("mda", "scf_rkl"):
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            recipe.read_text(encoding="utf-8")
            .replace("weight: 0.5", "{}")
            .replace("parameters:\n    {}", "parameters: {}")
        )
    result = mergepipe.run(build_job(tmp_path), workers=1)
    told = result.manifest["reconstructions"]
    assert list(told) == used
    card = (result.output / "README.md").read_text(encoding="utf-8")
    for name in used:
        declared = METHODS.get(name) or SPARSIFIERS[name]
        assert told[name]["specification"] == declared.specification
        assert (told[name]["known"], told[name]["chosen"]) == (list(declared.known), list(declared.chosen))
        assert declared.known
        assert f"`{declared.specification}`" in card
    assert ("reconstruction" in card) == bool(used)
