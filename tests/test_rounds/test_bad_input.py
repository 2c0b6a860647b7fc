"""What makes no sense is refused, and what is defined is finite: every method of the registry alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import NonFiniteError, RecipeError
from mergepipe.pipeline.status import status
from mergepipe.tasks.parameter import REQUIRED
from mergepipe.tasks.registry import METHODS
from support import whole

SHAPES: dict[str, tuple[int, ...]] = {"a.up.weight": (12, 18), "b.experts.weight": (3, 6, 5), "c.norm.weight": (31,)}
VALUES: dict[str, Any] = {"weight": 0.5, "density": 0.6, "t": 0.25, "epsilon": 0.1, "gamma": 0.1}
QUICK = ("task_arithmetic", "ties", "mda", "opcm", "scf_rkl")
"""What `make test` runs; `make test-all` runs all methods."""

NAMES = [
    pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])
    for name, method in METHODS.items()
    if method.takes == "models"
]
COPIES = "passthrough"


def document(name: str) -> dict[str, Any]:
    parameters = {p.name: VALUES[p.name] for p in METHODS[name].parameters if p.default is REQUIRED}
    return {"merge_method": name, "parameters": parameters}


def count(name: str) -> int:
    low, high = METHODS[name].min_models, METHODS[name].max_models
    return max(low, min(2, high or 2))


def models(name: str) -> tuple[whole.Model, list[whole.Model]]:
    return whole.family(5, models=count(name), shapes=SHAPES)


@pytest.mark.parametrize("name", [name for name in NAMES if name.values != (COPIES,)])
@pytest.mark.parametrize(("value", "tensor"), [(np.nan, "a.up.weight"), (-np.inf, "c.norm.weight")])
def test_not_a_number(tmp_path: Path, name: str, value: float, tensor: str) -> None:
    """Named with model, tensor and first index; built anew once that is mended, the merge is made."""
    base, experts = models(name)
    whole.prepare(tmp_path, base, experts, document(name))
    path = tmp_path / f"expert-{len(experts) - 1}" / "model.safetensors"
    held = load_file(path)
    held[tensor].reshape(-1)[[7, 9]] = value
    save_file(held, path, {"format": "pt"})
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged", memory="3GiB")
    with pytest.raises(NonFiniteError, match=rf"'{tensor}' of model '.*{path.parent.name}' holds a .* at element 7"):
        mergepipe.run(tmp_path / "work")
    found = status(tmp_path / "work")
    assert found.state == "interrupted"
    assert found.failure is not None
    assert tensor in found.failure
    mended = whole.family(5, models=count(name), shapes=SHAPES)[1][-1]
    whole.write(path.parent, mended)
    mergepipe.build(
        tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged", memory="3GiB", force=True
    )
    mergepipe.run(tmp_path / "work")
    assert all(np.isfinite(values).all() for values in whole.read(tmp_path / "merged").values())


def test_what_is_taken_over_is_not_looked_at(tmp_path: Path) -> None:
    """Until something is made of it."""
    base, experts = models(COPIES)
    whole.prepare(tmp_path, base, experts, document(COPIES))
    path = tmp_path / "expert-0" / "model.safetensors"
    held = load_file(path)
    held["a.up.weight"].reshape(-1)[7] = np.nan
    save_file(held, path, {"format": "pt"})
    mergepipe.build(tmp_path / "recipe.yaml", work=tmp_path / "work", out=tmp_path / "merged")
    mergepipe.run(tmp_path / "work")
    for tensor, values in whole.read(tmp_path / "merged").items():
        np.testing.assert_array_equal(values, held[tensor])
    scaled = {"merge_method": COPIES, "parameters": {"scale": 0.5}}
    whole.prepare(tmp_path / "scaled", base, [held], scaled)
    mergepipe.build(tmp_path / "scaled" / "recipe.yaml", work=tmp_path / "job", out=tmp_path / "half")
    with pytest.raises(NonFiniteError, match=r"'a\.up\.weight' .* at element 7"):
        mergepipe.run(tmp_path / "job")


@pytest.mark.parametrize("name", NAMES)
def test_identical_models_have_a_defined_merge(tmp_path: Path, name: str) -> None:
    """Two copies of one model, and copies of the base: finite, and the base where nothing changed."""
    base, experts = models(name)
    same = [dict(experts[0]) for _ in experts]
    twins = whole.merged(tmp_path / "twins", base, same, document(name), dtypes="float64")
    assert all(np.isfinite(values).all() for values in twins.values())
    still = whole.merged(tmp_path / "still", base, [dict(base) for _ in experts], document(name), dtypes="float64")
    for tensor, values in base.items():
        if name != "linear" or METHODS[name].base != "ignored":
            np.testing.assert_allclose(still[tensor], values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].base in ("required", "primary")])
def test_a_base_is_needed(tmp_path: Path, name: str) -> None:
    base, experts = models(name)
    with pytest.raises(RecipeError, match=rf"base_model.*is missing: {name} needs one"):
        whole.prepare(tmp_path, base, experts, {**document(name), "base_model": None})


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].max_models is not None])
def test_no_more_models_than_it_takes(tmp_path: Path, name: str) -> None:
    most = METHODS[name].max_models
    assert most is not None
    base, experts = whole.family(5, models=most + 1, shapes=SHAPES)
    with pytest.raises(RecipeError, match=rf"{name} takes .*{most} models?.*found {most + 1}"):
        whole.prepare(tmp_path, base, experts, document(name))


@pytest.mark.parametrize("quantile", [1.0, 1.5, -0.1, float("nan"), "most", True])
def test_quantiles_that_are_none(tmp_path: Path, quantile: Any) -> None:
    base, experts = models("scf_rkl")
    with pytest.raises(RecipeError, match=r"quantile.*expected a number from 0 to below 1|from 0 below 1"):
        whole.prepare(tmp_path, base, experts, {"merge_method": "scf_rkl", "parameters": {"quantile": quantile}})
