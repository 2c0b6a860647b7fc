"""A sparsifier and a method that thins: the method's trim gives way, its random drop comes after."""

from __future__ import annotations

from typing import Any

import pytest

from mergepipe.errors import RecipeError
from mergepipe.pipeline.recipe import Recipe, parse_recipe, settings

NAME = "layers.0.weight"


def parse(method: str, **more: Any) -> Recipe:
    models = [{"model": "a", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 1.0}}]
    document = {"merge_method": method, "base_model": "base", "models": models} | more
    return parse_recipe({key: value for key, value in document.items() if value is not None}, relative_to="/models")


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_the_density_is_that_of_the_method_itself(method: str) -> None:
    recipe = parse(method, parameters={"density": 0.5}, sparsify={"method": "magnitude", "density": 0.3})
    found = settings(recipe, NAME, 1)
    assert [params["density"] for params in found.model_params] == [0.5, 0.5]
    assert [params["density"] for params in found.sparsify_params] == [0.3, 0.3]
    assert settings(parse(method, parameters={"density": 0.5}), NAME, 1).sparsify == "none"
    assert settings(parse(method, parameters={"density": 0.5}, sparsify="tadrop"), NAME, 1).sparsify == "tadrop"


def test_one_density_does_not_count_twice() -> None:
    with pytest.raises(RecipeError, match=r"\$\.sparsify\.density: is missing: dare_ties takes the density"):
        parse("dare_ties", parameters={"density": 0.5}, sparsify="magnitude")


@pytest.mark.parametrize("method", ["breadcrumbs", "breadcrumbs_ties"])
def test_a_sparsifier_replaces_the_trim(method: str) -> None:
    found = settings(parse(method, parameters={"density": 0.5, "gamma": 0.1}), NAME, 1)
    assert (found.sparsify, found.sparsify_params[0]) == (
        "breadcrumbs",
        {"density": 0.5, "gamma": 0.1, "rescale": False},
    )
    found = settings(parse(method, parameters={"density": 0.5}, sparsify="random"), NAME, 1)
    assert (found.sparsify, found.sparsify_params[0]) == ("random", {"density": 0.5, "rescale": "l1"})
    with pytest.raises(RecipeError, match="gamma: has no effect"):
        parse(method, parameters={"gamma": 0.5}, sparsify="tadrop")


def test_an_optional_base() -> None:
    assert parse("nuslerp", base_model=None).base_model is None
    assert settings(parse("multislerp", sparsify="tadrop"), NAME, 1).sparsify == "tadrop"
    with pytest.raises(RecipeError, match="name a `base_model`"):
        parse("multislerp", base_model=None, sparsify="tadrop")
