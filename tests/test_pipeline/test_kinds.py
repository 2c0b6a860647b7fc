"""What is planned once for tensors of one kind is what would be planned for each: for every method, and any recipe."""

from __future__ import annotations

import gc
import itertools
import json
import math
from dataclasses import asdict, fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.errors import RecipeError
from mergepipe.pipeline import kept
from mergepipe.pipeline import schedule as scheduling
from mergepipe.pipeline.kinds import kind_of, of_each_kind
from mergepipe.pipeline.memory import MIB, Ceiling
from mergepipe.pipeline.plan import PLAN_FORMAT, Plan, PlannedTensor, Source
from mergepipe.pipeline.recipe import parse_recipe, settings
from mergepipe.pipeline.schedule import schedule
from mergepipe.pipeline.shared_settings import SharedSettings
from mergepipe.storage.collector import paused_collector
from mergepipe.tasks.parameter import REQUIRED, Parameter
from mergepipe.tasks.registry import METHODS, SPARSIFIERS

SHAPES = {
    "model.embed_tokens.weight": (512, 64),
    "model.layers.0.mlp.up_proj.weight": (512, 64),
    "model.layers.1.mlp.up_proj.weight": (512, 64),
    "model.layers.1.mlp.down_proj.weight": (64, 512),
    "lm_head.weight": (512, 64),
    "model.norm.weight": (64,),
    "model.layers.0.norm.weight": (64,),
}
PAIRS = {f"model.layers.{layer}.q.lora_{side}.weight": (16, 16) for layer in (0, 1) for side in "AB"}


def value_of(parameter: Parameter) -> Any:
    """A value that any method takes."""
    found = 0.5 if parameter.default is REQUIRED else parameter.default
    return list(found) if isinstance(found, tuple) else found


def plan_of(name: str, sparsify: str | None = None) -> Plan:
    """A plan in which one method makes tensors of few kinds, one of them copied; its settings are the defaults."""
    method, shapes = METHODS[name], PAIRS if METHODS[name].takes == "adapters" else SHAPES
    models = 2 if method.max_models is None else method.max_models
    chosen = SPARSIFIERS[sparsify or method.trim]
    each = {p.name: value_of(p) for p in method.parameters if p.per_model and not p.without_effect}
    thinned = {p.name: value_of(p) for p in chosen.parameters}
    tensors = [
        PlannedTensor(
            tensor, shape, "BF16", "merge",
            None if method.base == "ignored" else Source(0, tensor, "BF16"),
            tuple(Source(k + 1, tensor, "BF16") for k in range(models)),
            method=name,
            params={p.name: value_of(p) for p in method.parameters if not p.per_model and not p.without_effect},
            model_params=(each,) * models,
            sparsify=chosen.name,
            sparsify_params=() if chosen.name == "none" else (thinned,) * models,
            importances=tuple(Source(k + 1, tensor, "F32") for k in range(models)) if method.importance else (),
        )
        for tensor, shape in shapes.items()
    ]  # fmt: skip
    copies = [PlannedTensor(f"ids.{n}", (7,), "I64", "copy", Source(0, f"ids.{n}", "I64"), ()) for n in range(2)]
    made = (*tensors, *copies)
    names = tuple(tensor.name for tensor in made)
    return Plan(
        PLAN_FORMAT, "id", "1", {}, (), made, (names,), {}, "/out", {}, None, None, (), 512 * MIB, 8192, 0
    )  # fmt: skip


def plain(plan: Plan) -> list[tuple[Any, ...]]:
    """How a plan is cut: everything but the records of sweeps, which are no values."""
    items = schedule(plan, Ceiling(2048 * MIB, 2), gathered=[False] * 9)
    return [tuple(getattr(item, one.name) for one in fields(item)) for item in items]


THINNED = [("task_arithmetic", name) for name in SPARSIFIERS if name != "none"]


@pytest.mark.parametrize(("name", "sparsify"), [*((name, None) for name in METHODS), *THINNED])
def test_a_kind_is_cut_as_each_of_its_tensors(name: str, sparsify: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(name, sparsify)
    kinds = of_each_kind(plan.tensors)
    assert len(kinds) < len(plan.tensors)
    shared = plain(plan)
    assert [found[0] for found in shared] == list(plan.tensors)
    items = schedule(plan, Ceiling(2048 * MIB, 2))
    held = kept.kept_bytes(plan, items)
    count = itertools.count()
    monkeypatch.setattr(scheduling, "kind_of", lambda tensor: next(count))
    monkeypatch.setattr(kept, "kind_of", lambda tensor: next(count))
    assert plain(plan) == shared
    assert kept.kept_bytes(plan, items) == held


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (64, 512)},
        {"dtype": "F32"},
        {"work": "float64"},
        {"scope": "model"},
        {"offset": 1},
        {"sparsify": "none", "sparsify_params": ()},
        {"params": {}},
        {"base": None},
        {"importances": (Source(1, "w", "BF16"),)},
        {"carried": Source(1, "w", "BF16")},
        {"base": Source(0, "w", "F16")},
    ],
)
def test_what_makes_another_kind(change: dict[str, Any]) -> None:
    tensor = plan_of("ties").tensors[1]
    assert kind_of(replace(tensor, name="other")) == kind_of(tensor)
    assert kind_of(replace(tensor, **change)) != kind_of(tensor)


RECIPE = """
merge_method: ties
base_model: /base
models:
  - model: /a
    parameters:
      weight: [0.1, 0.9]
      density: [{filter: mlp, value: 0.25}, {filter: attn, value: [0.1, 0.7]}, {value: 0.5}]
  - model: /b
    parameters: {weight: 0.3}
parameters:
  density: [{filter: norm, value: 0.75}, {value: 0.4}]
rules:
  - match: norm
    merge_method: linear
    parameters: {weight: 0.6}
  - match: head
    sparsify: {method: magnitude, density: [{filter: lm, value: 0.3}, {value: 0.2}]}
"""
WORDS = st.sampled_from(["mlp", "attn", "norm", "lm_head", "embed", "head"])
PLACES = st.one_of(st.just((None, 0)), st.integers(0, 3).map(lambda layer: (layer, 4)))


@given(st.lists(st.tuples(WORDS, PLACES, WORDS, WORDS), min_size=2, max_size=12))
def test_shared_settings_are_each_tensors_own(asked: list[tuple[str, tuple[int | None, int], str, str]]) -> None:
    recipe = parse_recipe(RECIPE)
    shared = SharedSettings(recipe)
    for name, (layer, layers), first, second in asked:
        names = [f"x.{first}", f"x.{second}"]
        own = settings(recipe, f"x.{name}", layers, layer=layer, names=names)
        # As a plan is saved, where tuples are lists.
        assert json.dumps(asdict(shared.of(f"x.{name}", layers, layer, names))) == json.dumps(asdict(own))


def test_tensors_that_nothing_tells_apart_share_their_settings() -> None:
    recipe = parse_recipe({"merge_method": "linear", "models": [{"model": "/a"}], "parameters": {"weight": 0.5}})
    shared = SharedSettings(recipe)
    assert shared.of("a", 2, 0, ["a"]) is shared.of("b", 2, 1, ["b"])


def test_every_tensor_without_a_value_is_told() -> None:
    recipe = parse_recipe(
        {"merge_method": "linear", "models": [{"model": "/a"}], "parameters": {"weight": [{"filter": "x", "value": 1}]}}
    )
    shared = SharedSettings(recipe)
    for name in ("a", "b"):
        with pytest.raises(RecipeError, match=f"'{name}'"):
            shared.of(name, 0, None, [name])


def test_the_collector_is_left_as_it_was() -> None:
    assert gc.isenabled()
    with paused_collector():
        with paused_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ValueError, match="mine"), paused_collector():
        raise ValueError("mine")
    assert gc.isenabled()


def test_a_plan_counts_no_sweep_that_is_never_made() -> None:
    """Exact thresholds of bf16: a sample and one sweep; ties are counted and norms taken where a recipe asks for it."""
    tensor = replace(plan_of("ties").tensors[1], shape=(4096, 1024))
    given = tensor.sparsify_params[0] | {"density": 0.2}

    def sweeps(**asked: Any) -> tuple[str, ...]:
        changed = replace(tensor, sparsify_params=({**given, **asked},) * 2)
        plan = replace(plan_of("ties"), tensors=(changed,), groups=((changed.name,),))
        (item,) = schedule(plan, Ceiling(512 * MIB, 2), gathered=[False] * 3)
        assert asked or item.sweep_reads == 1 + 1 / 16
        return item.sweeps

    assert not {"ties", "norms after thinning"} & set(sweeps())
    assert "ties" in sweeps(tie_rule="index")
    assert "norms after thinning" in sweeps(rescale=True)


def test_a_pool_grows_with_the_passes_that_turn_in_it() -> None:
    """Of a tensor that is streamed: what is held where a pass turns is not read again, but memory has its price."""

    def pool(name: str, ceiling: int, count: int = 1) -> float:
        tensor = replace(plan_of(name).tensors[0], shape=(131072, 4096))
        if name == "scf_rkl":  # whose scores are guessed else, which saves a pass
            tensor = replace(tensor, params={**(tensor.params or {}), "importance": "pointwise"})
        tensors = tuple(replace(tensor, name=f"{n}") for n in range(count))
        groups = tuple((tensor.name,) for tensor in tensors)
        plan = replace(plan_of(name), tensors=tensors, groups=groups, chunk_bytes=32 * MIB)
        item, *_ = items = schedule(plan, Ceiling(ceiling, 2), gathered=[True] * 3)
        assert not scheduling.is_resident(item, item.pool)
        found = scheduling.pool_bytes(items)
        assert found <= item.pool, "no more than there is room for"
        return found / item.streamed

    assert [pool(name, 1024 * MIB) for name in ("linear", "ties", "scf_rkl")] == [1, 1, 2]
    assert 1 < pool("scf_rkl", 768 * MIB) < 2
    # Of many such tensors it takes all the room there is.
    assert pool("linear", 2048 * MIB, 16) == 1
    assert pool("scf_rkl", 2048 * MIB, 3) == 2
    assert pool("scf_rkl", 2048 * MIB, 4) > 4


def test_lists_save_a_read_where_the_pool_can_do_without_their_room() -> None:
    plan, shape = plan_of("scf_rkl"), (131072, 4096)
    most = 2 * (math.prod(shape) // 128 + 64 * shape[0])
    tensor = replace(plan.tensors[0], shape=shape)
    sure = replace(tensor, params={**(tensor.params or {}), "importance": "pointwise"})
    found = {}
    for ceiling in (*range(320, 1024, 16), 2**14):
        both = []
        for one in (tensor, sure):
            changed = replace(plan, tensors=(one,), groups=((one.name,),), chunk_bytes=8 * MIB)
            both += schedule(changed, Ceiling(ceiling * MIB, 2), gathered=[True] * 3)
        guessed, other = both
        assert (other.listed, other.sweep_reads) == (0, 2)
        found[ceiling] = guessed.listed
        if guessed.listed:
            assert guessed.sweep_reads == 1 + 1 / 32
            assert guessed.pool >= guessed.streamed
            assert other.pool - guessed.pool >= 4 * most
            assert guessed.projected - other.projected >= 4 * most, "it counts as memory of the run"
        elif ceiling < 1024:
            assert guessed.sweep_reads == 2
            assert guessed.pool - 4 * most < guessed.streamed + 8 * MIB
    assert found.pop(2**14) == 0, "what is kept is read once, whatever is made of it"
    assert set(found.values()) == {0, most}
    assert list(found.values()) == sorted(found.values())


@pytest.mark.parametrize("shape", [(8192, 4096), (8192, 14336)])
@pytest.mark.parametrize("name", ["linear", "breadcrumbs", "scf_rkl", "multislerp"])
def test_a_plan_foretells_one_read_at_least(name: str, shape: tuple[int, int]) -> None:
    """However much of a tensor there is room for."""
    tensor = replace(plan_of(name).tensors[0], shape=shape)
    tensors = tuple(replace(tensor, name=f"{n}") for n in range(8))
    plan = replace(plan_of(name), tensors=tensors, groups=(tuple(one.name for one in tensors),), chunk_bytes=8 * MIB)
    found = []
    for ceiling in range(512, 4096, 128):
        item, *_ = items = schedule(plan, Ceiling(ceiling * MIB, 2), gathered=[True] * 3)
        found.append(scheduling.disk_bytes_read(item, scheduling.pool_bytes(items)))
        assert item.tensor.input_bytes() <= found[-1] <= item.bytes_read
    assert found[-1] == item.tensor.input_bytes()
    assert found == sorted(found, reverse=True), "more memory never reads more"


def test_passes_over_whole_matrices_save_no_read() -> None:
    """A solver's panels are read in an order of their own."""
    one = plan_of("iso_c", "magnitude").tensors[1]
    thinned = tuple(params | {"density": 0.5} for params in one.sparsify_params)
    tensor = replace(one, shape=(4096, 4096), sparsify_params=thinned)
    plan = replace(plan_of("iso_c", "magnitude"), tensors=(tensor,), groups=((tensor.name,),))
    (item,) = items = schedule(plan, Ceiling(2600 * MIB, 2), gathered=[True] * 3)
    assert item.held
    assert item.sweep_reads > 1
    pool = min(scheduling.pool_bytes(items), item.tensor.input_bytes())
    assert scheduling.disk_bytes_read(item, pool) == item.bytes_read
