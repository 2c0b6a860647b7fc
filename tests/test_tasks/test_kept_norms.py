"""The norm of what is kept: by its own sweep for every thinning, against elements that are not zero afterwards."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mergepipe.tasks.kept_norms import KeptNorms, thinning
from mergepipe.tasks.method import Array
from support.drive import make_job, merge, sweep

SHAPE = (7, 20_011)
"""Three blocks, the last one short."""

OPTIONS: list[dict[str, Any]] = [
    {"method": "magnitude", "density": 0.3},
    {"method": "magnitude", "density": 0.3, "tie_rule": "index"},
    {"method": "magnitude", "density": 0.3, "rescale": True},
    {"method": "magnitude", "density": 0.0},
    {"method": "random", "density": 0.4, "rescale": "none"},
    {"method": "random", "density": 0.4, "rescale": "inverse_keep"},
    {"method": "breadcrumbs", "density": 0.5, "gamma": 0.1},
    {"method": "della", "density": 0.4, "rescale": "inverse_keep"},
    {"method": "tadrop"},
    {"method": "tadrop", "rescale": "l2"},
    {"method": "tadrop", "drop": "random"},
    {"method": "tadrop", "unstack_3d": True, "rescale": "inverse_keep"},
]


def measured(name: str, models: list[Array], each: list[dict[str, Any]], *given: Any) -> tuple[Array, dict[str, Array]]:
    """What the sweep finds, and the state it began with."""
    base = np.zeros_like(models[0])
    state = merge(name, models, base, each, *given).state
    found, job = make_job(name, models[0].shape, models[0].dtype, each, *given)
    thin = thinning(job, found)
    assert thin is not None
    fresh = {key: value for key, value in state.items() if key != "kept_norms"}
    norms = sweep(found, job, KeptNorms(thin), fresh, models, base, range(job.blocks), 1)["kept_norms"]
    return norms, state


def norm_of(values: Array, kept: Array) -> float:
    whole = values.astype("f8")
    return float(np.linalg.norm(whole[kept]) / np.linalg.norm(whole))


def draw(seed: int, shape: tuple[int, ...] = SHAPE) -> Array:
    """Coarse enough for ties."""
    return (np.random.default_rng(seed).normal(size=shape) * 64).round().astype("f4") / 64


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_sparsifier(options: dict[str, Any]) -> None:
    delta = draw(1, (3, 50, 401) if "unstack_3d" in options else SHAPE)
    norms, state = measured("task_arithmetic", [delta], [{"weight": 1}], None, options)
    left = merge("task_arithmetic", [delta], np.zeros_like(delta), [{"weight": 1}], None, options).out
    expected = norm_of(delta, left != 0)
    assert norms[0] == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < 1 or options.get("density") == 0
    if "kept_norms" in state:
        assert norms.tobytes() == state["kept_norms"].tobytes(), "to the bit what comes by the way elsewhere"


@pytest.mark.parametrize("host", ["dare_linear", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("sparsify", [None, {"method": "magnitude", "density": 0.5, "rescale": True}], ids=str)
def test_hosts_that_drop_at_random(host: str, sparsify: dict[str, Any] | None) -> None:
    delta, params = draw(2), {"rescale_by": "inverse_keep"}
    each = [{"weight": 1, "density": 0.4}]
    norms, _ = measured(host, [delta], each, params, sparsify)
    left = merge(host, [delta], np.zeros_like(delta), each, params, sparsify).out
    assert norms[0] == pytest.approx(norm_of(delta, left != 0), rel=1e-12)


def test_sce_selects() -> None:
    models = [draw(3), draw(4), draw(5)]
    norms, state = measured("sce", models, [{}] * 3, {"select_topk": 0.3})
    whole = [float((model.astype("f8") ** 2).sum()) for model in models]
    np.testing.assert_allclose(norms, np.sqrt(state["energies"] / whole), rtol=1e-12)
    assert (norms < 1).all()


@pytest.mark.parametrize("kind", ["random", "della"])
def test_what_one_model_restores_is_no_matter_of_another(kind: str) -> None:
    """One restores a norm, so that all are measured; the other scales by itself, which is no part of what it keeps."""
    models = [draw(6), draw(7)]
    options = [{"method": kind, "density": 0.4, "rescale": rescale} for rescale in ("l1", "inverse_keep")]
    norms, state = measured("task_arithmetic", models, [{"weight": 1}] * 2, None, options)
    np.testing.assert_array_equal(state["kept_norms"], norms)
    assert (norms < 0.9).all()


def test_a_task_vector_of_zeros_keeps_nothing() -> None:
    norms, _ = measured("ties", [np.zeros(SHAPE, "f4"), draw(8)], [{"weight": 1, "density": 0.5}] * 2)
    assert norms[0] == 0
    assert 0 < norms[1] < 1
