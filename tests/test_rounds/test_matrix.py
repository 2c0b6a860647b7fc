"""Every sparsifier on every method: it thins as it does anywhere else, or the pair is refused with its reason.

A sparsified merge has to be the plain merge of models that were thinned before; what a sparsifier makes of each model
is asked of task arithmetic with all the weight on that one. Both lists come from the registry, so a new method or
sparsifier is in the matrix from its first day.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergepipe.errors import RecipeError
from mergepipe.tasks.parameter import REQUIRED
from mergepipe.tasks.registry import METHODS, SPARSIFIERS
from support import whole

SHAPES: dict[str, tuple[int, ...]] = {
    "layers.0.up.weight": (12, 18),
    "layers.0.experts.weight": (3, 6, 5),
    "norm.weight": (31,),
}
VALUES: dict[str, Any] = {"weight": 0.5, "density": 0.6, "t": 0.25, "epsilon": 0.1, "gamma": 0.1}
"""What a method or a sparsifier gets for a parameter without a default."""

HOSTS = [name for name, method in METHODS.items() if method.space == "deltas"]
OTHERS = [name for name in METHODS if name not in HOSTS]
DRAWING = {"dare_linear", "dare_ties", "della", "della_linear"}
"""Hosts that thin at random themselves, from a stream of its own after another sparsifier."""

OPTIONS: dict[str, list[dict[str, Any]]] = {
    "tadrop": [
        {},
        {"target_density": 0.4, "calibrate_scope": "all", "tie_rule": "index"},
        {"metric": "l1l2", "drop": "random", "rescale": "none"},
        {"metric": "participation", "rescale": "l1", "tie_rule": "index"},
        {"metric": "hoyer", "rescale": "l2", "unstack_3d": True},
        {"drop": "random", "s_offset": 0.3},
        {"metric": "hoyer", "drop": "random", "rescale": "l2"},
        {"target_density": 0.5, "calibrate_scope": "task", "unstack_3d": True, "rescale": "inverse_keep"},
        {"target_density": 0.5, "drop": "random", "metric": "l1l2", "rescale": "l1"},
        {"include": ["experts", "up"], "exclude": ["up"], "q_lo": 0.25, "q_hi": 0.75},
    ]
}


def required(parameters: Any) -> dict[str, Any]:
    """Values for all parameters that need one."""
    return {p.name: VALUES[p.name] for p in parameters if p.default is REQUIRED and not p.without_effect}


def recipe(host: str, sparsify: Any) -> dict[str, Any]:
    """A recipe for a host with a sparsifier."""
    method = METHODS[host]
    given = required(method.parameters)
    if sparsify != "none" and "density" not in {p.name for p in SPARSIFIERS[sparsify["method"]].parameters}:
        given.pop("density", None)
    return {"merge_method": host, "sparsify": sparsify, "parameters": given}


def family(count: int) -> tuple[whole.Model, list[whole.Model]]:
    """Multiples of 1/64 in float64: sums and differences are exact."""
    base, experts = whole.family(3, models=count, shapes=SHAPES)
    return base, experts


def thinned(folder: Path, base: whole.Model, experts: list[whole.Model], sparsify: Any) -> list[whole.Model]:
    """Each model as it is after the sparsifier."""
    found = []
    for k in range(len(experts)):
        one = {"merge_method": "task_arithmetic", "sparsify": sparsify}
        each = [{"weight": float(j == k)} for j in range(len(experts))]
        found.append(whole.merged(folder / f"thin-{k}", base, experts, one, each, "float64"))
    return found


CASES = [(name, options) for name in SPARSIFIERS for options in OPTIONS.get(name, [{}])]
QUICK = (("tadrop", {}), ("tadrop", OPTIONS["tadrop"][1]))
"""What `make test` runs; `make test-all` runs the whole matrix, which takes minutes."""

MARKED = [
    pytest.param(c, id=f"{c[0]}-{n}", marks=[] if c in QUICK else [pytest.mark.slow]) for n, c in enumerate(CASES)
]


@pytest.fixture(scope="module", params=MARKED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[whole.Model]]:
    """A sparsifier with options, and what it makes of three models."""
    name, options = request.param
    sparsify = {"method": name, **required(SPARSIFIERS[name].parameters), **options}
    density = {p.name for p in SPARSIFIERS[name].parameters} & {"density"}
    sparsify |= dict.fromkeys(density, 0.6)
    base, experts = family(3)
    return sparsify, thinned(tmp_path_factory.mktemp("thin"), base, experts, sparsify)


@pytest.mark.parametrize("host", HOSTS)
def test_a_sparsified_merge_is_a_merge_of_sparsified_models(
    tmp_path: Path, case: tuple[Any, list[whole.Model]], host: str
) -> None:
    sparsify, models = case
    count = min(METHODS[host].max_models or 3, 3)
    base, experts = family(3)
    experts, models = experts[:count], models[:count]
    document = recipe(host, sparsify)
    document["parameters"].pop("density", None) if host not in DRAWING else None
    found = whole.merged(tmp_path / "at-once", base, experts, document, dtypes="float64")
    assert all(np.isfinite(value).all() for value in found.values())
    if host in DRAWING or (count < 3 and sparsify.get("calibrate_scope") == "all"):
        return  # drawn, or calibrated, in another way
    expected = whole.merged(tmp_path / "before", base, models, {**document, "sparsify": "none"}, dtypes="float64")
    # pcb divides by the sum of its weights: of an element at its floor nothing but last bits is left in either.
    rtol = 1e-4 if host == "pcb" else 1e-7
    for name in base:
        np.testing.assert_allclose(found[name], expected[name], rtol=rtol, atol=rtol / 100, err_msg=name)


@pytest.mark.parametrize("sparsifier", [name for name in SPARSIFIERS if name != "none"])
@pytest.mark.parametrize("method", OTHERS)
def test_methods_of_weights_refuse_a_sparsifier(tmp_path: Path, method: str, sparsifier: str) -> None:
    base, experts = family(METHODS[method].max_models or 2)
    document = recipe(method, {"method": sparsifier, **required(SPARSIFIERS[sparsifier].parameters)})
    with pytest.raises(RecipeError, match="no task vector to thin"):
        whole.prepare(tmp_path, base, experts, document)
