"""Whole-model scope through files: trimming, TADrop's target, weights from norms; and the rounds that make them."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mergepipe
from mergepipe.errors import Interrupted, RecipeError
from mergepipe.pipeline.events import UnitFinished
from mergepipe.pipeline.summary import summarize, tensor_rows
from mergepipe.storage.journal import read_journal
from mergepipe.tasks.calibration import water_fill
from mergepipe.tasks.weighting import nan_weights
from support import reference, whole

MIXED = {"layers.1.norm.weight": "float64", "layers.0.experts.weight": "bfloat16"}


@pytest.mark.parametrize(
    ("rho", "kappa", "keep"),
    [
        (0.2, 0.5454545454545454, (0.4909090909, 0.2727272727, 0.0545454545)),
        (0.5, 1.5384615384615385, (1, 0.7692307692, 0.1538461538)),
        (0.9, 8, (1, 1, 0.8)),
    ],
)
def test_water_filling_of_the_specification(rho: float, kappa: float, keep: tuple[float, ...]) -> None:
    found, rates = water_fill(np.array([0.1, 0.5, 0.9]), np.array([100, 200, 300]), rho)
    assert found == pytest.approx(kappa, rel=1e-14)
    np.testing.assert_allclose(rates, keep, rtol=1e-9)


@given(st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 1000)), min_size=1, max_size=9), st.floats(0.001, 1))
def test_water_filling_fills(tensors: list[tuple[float, int]], rho: float) -> None:
    densities, sizes = (np.array(column, float) for column in zip(*tensors, strict=True))
    kappa, keep = water_fill(densities, sizes, rho)
    assert (sizes * keep).sum() == pytest.approx(rho * sizes.sum(), rel=1e-9)
    assert ((keep >= 0) & (keep <= 1)).all()
    if np.isfinite(kappa):
        np.testing.assert_allclose(keep, np.minimum(1, kappa * (1 - densities)), rtol=1e-9)


@pytest.mark.parametrize("tie_rule", ["keep", "index"])
@pytest.mark.parametrize("dtypes", ["float32", "float64", "bfloat16", MIXED])
def test_trimming_over_the_whole_model(tmp_path: Path, tie_rule: str, dtypes: Any) -> None:
    base, experts = whole.family()
    weights = [1.0, 0.5, 0.25]
    recipe = {"merge_method": "ties", "scope": "model", "parameters": {"density": 0.3, "tie_rule": tie_rule}}
    found = whole.merged(tmp_path, base, experts, recipe, [{"weight": w} for w in weights], dtypes)
    order = {name: base[name] for name in file_order(tmp_path)}
    expected = in_order(order, lambda b, taus: whole.whole_ties(b, taus, weights, 0.3, tie_rule), experts)
    for name, value in expected.items():
        tolerance = 0 if value.size == 0 else {"bfloat16": 2**-8, "float64": 1e-12}.get(kind(dtypes, name), 1e-6)
        np.testing.assert_allclose(found[name], value, rtol=tolerance, atol=1e-9, err_msg=name)
    densities = json.loads((tmp_path / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["densities"]
    kept = sum(np.array(densities[name]) * base[name].size for name in base)
    assert (kept >= int(0.3 * sum(value.size for value in base.values())) - 1e-6).all()
    if tie_rule == "index":
        np.testing.assert_allclose(kept, int(0.3 * sum(value.size for value in base.values())), atol=1e-6)


def kind(dtypes: Any, name: str) -> str:
    """The dtype of a tensor."""
    return dtypes if isinstance(dtypes, str) else dtypes.get(name, "float32")


def file_order(folder: Path) -> list[str]:
    """Names in the order in which the base's file holds them: the order of the plan."""
    data = (folder / "base" / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    header.pop("__metadata__", None)
    return sorted(header, key=lambda name: header[name]["data_offsets"])


def in_order(order: whole.Model, method: Any, experts: list[whole.Model]) -> whole.Model:
    """A method of flattened models, applied in the order of `order`."""
    join = lambda model: np.concatenate([model[name].reshape(-1) for name in order])  # noqa: E731
    below = join(order)
    values = method(below, [join(expert) - below for expert in experts])
    ends = np.cumsum([value.size for value in order.values()])
    parts = np.split(values, ends[:-1])
    return {name: part.reshape(order[name].shape) for name, part in zip(order, parts, strict=True)}


def test_a_rescale_restores_each_tensor(tmp_path: Path) -> None:
    base, experts = whole.family(16, models=1)
    sparsify = {"method": "magnitude", "density": 0.3, "rescale": True}
    recipe = {"merge_method": "task_arithmetic", "scope": "model", "sparsify": sparsify, "parameters": {"weight": 1.0}}
    found = whole.merged(tmp_path, base, experts, recipe)
    kept = 0
    for name, value in base.items():
        before, after = np.abs(experts[0][name] - value).sum(), np.abs(found[name] - value).sum()
        kept += np.count_nonzero(found[name] - value)
        assert after == 0 or after == pytest.approx(before, rel=1e-5), name
    assert kept >= int(0.3 * sum(value.size for value in base.values()))


def test_the_scope_matters_and_a_vote_of_zero_takes_the_majority(tmp_path: Path) -> None:
    """Two models that contradict each other exactly in places, in a model that leans to minus."""
    base = {"a": np.zeros(4), "b": np.zeros(6)}
    first = {"a": np.array([1.0, 1, -1, 0]), "b": np.array([-4.0, -4, -4, 8, 8, -8])}
    second = {"a": np.array([1.0, -1, -1, 0]), "b": np.array([-4.0, -4, 4, -8, -8, -8])}
    recipe = {"merge_method": "ties", "scope": "model", "parameters": {"density": 1.0, "weight": 1.0}}
    out = whole.merged(tmp_path / "all", base, [first, second], recipe)
    # With nothing to trim there is still a majority: plus once, minus four times over.
    np.testing.assert_array_equal(out["a"], [1, -1, -1, 0])
    np.testing.assert_array_equal(out["b"], [-4, -4, -4, -8, -8, -8])
    trimmed = whole.merged(
        tmp_path / "some", base, [first, second], {**recipe, "parameters": {"density": 0.6, "weight": 1.0}}
    )
    np.testing.assert_array_equal(trimmed["a"], 0)


@pytest.mark.parametrize("host", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("scope", ["task", "all"])
def test_tadrop_to_a_target(tmp_path: Path, scope: str, host: str) -> None:
    base, experts = whole.family(1)
    sparsify = {
        "method": "tadrop",
        "target_density": 0.4,
        "calibrate_scope": scope,
        "tie_rule": "index",
        "metric": "l1l2",
    }
    recipe = {"merge_method": host, "sparsify": sparsify, "parameters": {"weight": 1.0}}
    found = whole.merged(tmp_path, base, experts, recipe)
    names = [name for name in base if base[name].size]
    taus = {name: [(expert[name] - base[name]) for expert in experts] for name in names}
    density = np.array([[reference.density_of(tau, "l1l2") for tau in taus[name]] for name in names])
    sizes = np.array([[base[name].size] * 3 for name in names], float)
    pools = [np.s_[:, k] for k in range(3)] if scope == "task" else [np.s_[:, :]]
    keep = np.zeros(density.shape)
    for pool in pools:
        keep[pool] = water_fill(density[pool].reshape(-1), sizes[pool].reshape(-1), 0.4)[1].reshape(density[pool].shape)
    for row, name in enumerate(names):
        thinned = [reference.tadrop(t, sparsify, 1 - r) for t, r in zip(taus[name], keep[row], strict=True)]
        expected = reference.task_vectors(
            base[name], thinned, [1.0] * 3, "sum" if host == "ties" else "none", host == "ties"
        )
        np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-9, err_msg=name)
    densities = json.loads((tmp_path / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["densities"]
    kept = sum(np.array(densities[name]) * base[name].size for name in names) / sizes.sum(0)
    np.testing.assert_allclose(kept if scope == "task" else kept.mean(), 0.4, atol=2e-4)


@pytest.mark.parametrize("leave", [{"exclude": ["embed"]}, {"include": ["layers", "nothing"]}])
def test_tadrop_leaves_excluded_tensors_out_of_the_sum(tmp_path: Path, leave: dict[str, Any]) -> None:
    base, experts = whole.family(2)
    sparsify = {"method": "tadrop", "target_density": 0.3, "tie_rule": "index", **leave}
    recipe = {"merge_method": "task_arithmetic", "sparsify": sparsify, "parameters": {"weight": 1.0}}
    found = whole.merged(tmp_path, base, experts, recipe)
    np.testing.assert_allclose(
        found["embed.weight"], sum(e["embed.weight"] for e in experts) - 2 * base["embed.weight"]
    )
    densities = json.loads((tmp_path / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["densities"]
    rest = [name for name in base if name != "embed.weight" and base[name].size]
    kept = sum(np.array(densities[name]) * base[name].size for name in rest) / sum(base[name].size for name in rest)
    np.testing.assert_allclose(kept, 0.3, atol=2e-4)


def test_tensors_with_other_targets_are_calibrated_apart(tmp_path: Path) -> None:
    base, experts = whole.family()
    sparsify = {
        "method": "tadrop",
        "tie_rule": "index",
        "calibrate_scope": "all",
        "target_density": [{"filter": "embed", "value": 0.2}, {"value": 0.4}],
    }
    recipe = {"merge_method": "task_arithmetic", "sparsify": sparsify, "parameters": {"weight": 1.0}}
    whole.merged(tmp_path, base, experts, recipe)
    densities = json.loads((tmp_path / "merged" / "mergepipe_manifest.json").read_text(encoding="utf-8"))["densities"]
    sizes = {name: value.size for name, value in base.items() if value.size}
    for target, names in ((0.2, ["embed.weight"]), (0.4, [name for name in sizes if name != "embed.weight"])):
        kept = sum(np.mean(densities[name]) * sizes[name] for name in names) / sum(sizes[name] for name in names)
        np.testing.assert_allclose(kept, target, atol=3e-3)


@pytest.mark.parametrize("norms", ["model", "tensor"])
@pytest.mark.parametrize("host", ["linear", "task_arithmetic", "ties", "dare_ties"])
def test_weights_from_norms(tmp_path: Path, host: str, norms: str) -> None:
    base, experts = whole.family(3)
    total = {"linear": 1.0, "task_arithmetic": 3.0}.get(host, 1.0)
    parameters = {"weighting": "nan", "nan_norms": norms, "nan_sum": "one" if total == 1 else "models"}
    parameters |= {"density": 1.0} if host in ("ties", "dare_ties") else {}
    found = whole.merged(tmp_path, base, experts, {"merge_method": host, "parameters": parameters})
    below = {name: np.zeros_like(base[name]) if host == "linear" else base[name] for name in base}
    vectors = [[expert[name] - below[name] for name in base] for expert in experts]
    weights = whole.nan_weights([np.concatenate([v.reshape(-1) for v in vector]) for vector in vectors], total)
    for position, name in enumerate(base):
        if not base[name].size:
            continue
        mine = [vector[position] for vector in vectors]
        w = whole.nan_weights(mine, total) if norms == "tensor" and all(np.any(x) for x in mine) else weights
        if norms == "tensor" and not all(np.any(x) for x in mine):
            w = nan_weights(np.array([(x * x).sum() for x in mine]), total).tolist()
        consensus = "sum" if host.endswith("ties") else "none"
        expected = reference.task_vectors(below[name], mine, w, consensus, host == "ties")
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("first", ["tensor", "model"])
def test_tensors_of_other_norms_are_another_group(tmp_path: Path, first: str) -> None:
    """Whichever comes first in the plan, what a rule says of some tensors leaves the weights of the others alone."""
    base, experts = whole.family(3, shapes={"a": (30,), "b": (40,), "c": (5, 6)})
    rule = {"match": "^a$" if first == "tensor" else "^c$", "parameters": {"nan_norms": "tensor"}}
    recipe = {"merge_method": "linear", "parameters": {"weighting": "nan"}, "rules": [rule]}
    found = whole.merged(tmp_path, base, experts, recipe)
    alone = "a" if first == "tensor" else "c"
    rest = [name for name in base if name != alone]
    together = whole.nan_weights([np.concatenate([e[name].ravel() for name in rest]) for e in experts])
    for name in base:
        weights = whole.nan_weights([e[name] for e in experts]) if name == alone else together
        expected = sum(w * e[name] for w, e in zip(weights, experts, strict=True))
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("norms", ["model", "tensor"])
@pytest.mark.parametrize("host", ["nuslerp", "multislerp"])
def test_weights_from_norms_on_arcs(tmp_path: Path, host: str, norms: str) -> None:
    """As if they had been written into the recipe."""
    base, experts = whole.family(4, models=2, shapes={"a": (30,), "b": (7, 40)})
    vectors = [{name: expert[name] - base[name] for name in base} for expert in experts]
    parameters = {"weighting": "nan", "nan_norms": norms}
    found = whole.merged(tmp_path / "nan", base, experts, {"merge_method": host, "parameters": parameters})
    for name in base:
        of = [v[name] if norms == "tensor" else whole.flat(v) for v in vectors]
        each = [{"weight": weight} for weight in whole.nan_weights(of)]
        given = whole.merged(tmp_path / name, base, experts, {"merge_method": host}, each)
        np.testing.assert_allclose(found[name], given[name], rtol=1e-6, atol=1e-7, err_msg=name)
        assert abs(each[0]["weight"] - 0.5) > 1e-3


@given(st.lists(st.floats(1e-30, 1e30), min_size=2, max_size=5), st.floats(1e-3, 1e3))
def test_nan_weights_are_scale_free_and_add_up(squares: list[float], scale: float) -> None:
    weights = nan_weights(np.array(squares))
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(nan_weights(np.array(squares) * scale), weights, rtol=1e-9)
    np.testing.assert_allclose(nan_weights(np.array(squares), 4.0), 4 * weights, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"merge_method": "linear", "scope": "model"}, "$.scope"),
        ({"sparsify": "breadcrumbs", "scope": "model"}, "$.scope"),
        ({"scope": "layer"}, "$.scope"),
        ({"parameters": {"weighting": "nan", "weight": 1.0}}, "$.parameters.weight"),
        ({"parameters": {"weighting": "inverse"}}, "$.parameters.weighting"),
        ({"sparsify": {"method": "tadrop", "target_density": 0}}, "$.sparsify.target_density"),
    ],
)
def test_refused(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    base, experts = whole.family(shapes={"a": (3,)})
    recipe = {"merge_method": "task_arithmetic", "parameters": {"weight": 1.0}, **change}
    with pytest.raises(RecipeError) as error:
        whole.prepare(tmp_path, base, experts, recipe)
    assert fault in str(error.value)


RECIPES: dict[str, dict[str, Any]] = {
    "ties": {
        "merge_method": "ties",
        "scope": "model",
        "parameters": {"density": 0.3, "weight": 1.0, "tie_rule": "index"},
    },
    "tadrop": {
        "merge_method": "ties",
        "sparsify": {"method": "tadrop", "target_density": 0.4, "rescale": "l2"},
        "parameters": {"weighting": "nan"},
    },
    "stacks": {
        "merge_method": "task_arithmetic",
        "sparsify": {"method": "tadrop", "target_density": 0.4, "unstack_3d": True, "tie_rule": "index"},
        "parameters": {"weight": 1.0},
    },
}


def weights_hash(folder: Path) -> str:
    """Of the merged file."""
    return hashlib.sha256((folder / "merged" / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", RECIPES)
def test_chunks_and_workers_change_no_byte(tmp_path: Path, name: str) -> None:
    base, experts = whole.family(4)
    found = set()
    for number, (chunk, workers) in enumerate([("64KiB", 1), ("8MiB", 3), ("256KiB", 2)]):
        folder = tmp_path / str(number)
        whole.prepare(folder, base, experts, RECIPES[name], chunk_size=chunk, store="copy" if number == 2 else "auto")
        mergepipe.run(folder / "work", workers=workers)
        found.add(weights_hash(folder))
    assert len(found) == 1


@pytest.mark.parametrize("name", RECIPES)
def test_resume_makes_no_finished_round_again(tmp_path: Path, name: str) -> None:
    """Stopped after every unit in turn: sweeps of finished rounds don't come back, and the bytes are the same."""
    base, experts = whole.family(5)
    whole.merged(tmp_path / "straight", base, experts, RECIPES[name])
    folder = tmp_path / "stopped"
    whole.prepare(folder, base, experts, RECIPES[name])
    lives, done = 0, 0
    while True:
        stop, seen = threading.Event(), [0]

        def listen(event: object, stop: threading.Event = stop, seen: list[int] = seen, after: int = 6 + lives) -> None:
            seen[0] += isinstance(event, UnitFinished)
            if seen[0] >= after:
                stop.set()

        try:
            mergepipe.run(folder / "work", workers=1, on_event=listen, stop=stop)
            break
        except Interrupted:
            lives += 1
        records = [
            (r["group"], r["round"]) for r in read_journal(folder / "work" / "journal.log") if r["type"] == "round"
        ]
        assert len(records) == len(set(records)) >= done
        done = len(records)
    assert lives > 2
    assert weights_hash(folder) == weights_hash(tmp_path / "straight")


def test_the_plan_counts_the_sweeps_of_rounds(tmp_path: Path) -> None:
    base, experts = whole.family()
    plan = whole.prepare(tmp_path, base, experts, RECIPES["ties"])
    rows = {row["name"]: row for row in tensor_rows(plan)}
    row = rows["embed.weight"]
    # Two levels of the histogram, kept elements, and the majority after the tensor's own ties.
    assert len(row["rounds"]) == 5
    reads = len(row["rounds"]) + len(row["sweeps"]) + 1
    assert row["bytes_read"] == reads * 4 * base["embed.weight"].size * 4
    assert summarize(plan)["sweeps"] == reads
