"""Gradients, filters and the numbering of layers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.pipeline.values import (
    MISSING,
    Filtered,
    FilterEntry,
    Gradient,
    is_total,
    layer_counts,
    layer_of,
    n_layers_of,
    resolve,
    stack_of,
    to_plain,
)

numbers = st.floats(-1e6, 1e6, allow_nan=False)
names = st.text("abcdefghij._", min_size=1, max_size=20)


def reference(values: list[float], layer: int, n_layers: int) -> float:
    """Interpolation as mergekit's documentation describes it, in other words than the code's."""
    t = 1.0 if n_layers == 1 else layer / (n_layers - 1)
    scaled = t * (len(values) - 1)
    left = int(scaled)
    right = min(left + 1, len(values) - 1)
    return values[left] + (values[right] - values[left]) * (scaled - left)


@given(numbers, names, st.integers(0, 99), st.integers(1, 100))
def test_a_scalar_is_the_same_everywhere(value: float, name: str, layer: int, n_layers: int) -> None:
    assert resolve(value, name, layer, n_layers) == value
    assert resolve(value, name, None, n_layers) == value


@given(st.lists(numbers, min_size=1, max_size=8), st.integers(1, 100), st.data())
def test_a_gradient_interpolates_over_the_layers(values: list[float], n_layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, n_layers - 1))
    found = resolve(Gradient(tuple(values)), "w", layer, n_layers)
    scale = max(1.0, *(abs(value) for value in values))
    assert found == pytest.approx(reference(values, layer, n_layers), abs=1e-9 * scale)
    assert min(values) - 1e-9 * scale <= found <= max(values) + 1e-9 * scale


@given(st.lists(numbers, min_size=1, max_size=8), st.integers(2, 100))
def test_a_gradient_starts_and_ends_at_its_ends(values: list[float], n_layers: int) -> None:
    gradient = Gradient(tuple(values))
    assert resolve(gradient, "w", 0, n_layers) == values[0]
    assert resolve(gradient, "w", n_layers - 1, n_layers) == values[-1]
    assert resolve(gradient, "w", None, n_layers) == values[0], "outside the layers: the first value"
    assert resolve(gradient, "w", 0, 1) == values[-1], "the only layer: the last value"


@given(st.lists(st.sampled_from(["keep", "index"]), min_size=1, max_size=5), st.integers(1, 30), st.data())
def test_words_and_flags_are_taken_stepwise(values: list[str], n_layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, n_layers - 1))
    found = resolve(Gradient(tuple(values)), "w", layer, n_layers)
    t = 1.0 if n_layers == 1 else layer / (n_layers - 1)
    assert found == values[int(t * (len(values) - 1))]
    flags = tuple(value == "keep" for value in values)
    assert resolve(Gradient(flags), "w", layer, n_layers) is (found == "keep")


@given(st.lists(st.tuples(names | st.none(), numbers), max_size=6), names)
def test_the_first_filter_that_matches_wins(entries: list[tuple[str | None, float]], name: str) -> None:
    spec = Filtered(tuple(FilterEntry(word, value) for word, value in entries))
    expected = next((value for word, value in entries if word is None or word in name), MISSING)
    assert resolve(spec, name, None, 0) == expected
    if is_total(spec):
        assert expected is not MISSING


def test_a_filter_may_lead_to_a_gradient() -> None:
    spec = Filtered((FilterEntry("mlp", Gradient((0.0, 1.0))), FilterEntry(None, 0.25)))
    assert resolve(spec, "model.layers.1.mlp.w", 1, 3) == 0.5
    assert resolve(spec, "model.layers.1.attn.w", 1, 3) == 0.25
    assert to_plain(spec) == [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.25}]


def test_what_is_missing_stays_missing() -> None:
    assert resolve(MISSING, "w", 0, 2) is MISSING
    assert not is_total(MISSING)
    assert repr(MISSING) == "missing"


@pytest.mark.parametrize(
    ("name", "stack", "layer"),
    [
        ("model.layers.11.mlp.experts.3.up_proj.weight", "model.layers", 11),
        ("transformer.h.0.ln_1.bias", "transformer.h", 0),
        ("bert.encoder.layer.7.output.dense.weight", "bert.encoder.layer", 7),
        ("decoder.block.2.layer.0.w", "decoder.block", 2),
        ("0.weight", "", 0),
        ("lm_head.weight", None, None),
        ("model.layers2.w", None, None),
        ("x.99999999999999999999.w", None, None),
        ("x.².w", None, None),
    ],
)
def test_layers_are_found_by_their_number(name: str, stack: str | None, layer: int | None) -> None:
    assert (stack_of(name), layer_of(name)) == (stack, layer)


def test_stacks_are_counted_apart() -> None:
    counts = layer_counts(["encoder.block.3.w", "decoder.block.1.w", "decoder.block.0.layer.8.w", "shared.weight"])
    assert counts == {"encoder.block": 4, "decoder.block": 2}
    assert n_layers_of("decoder.block.0.w", counts) == 2
    assert n_layers_of("shared.weight", counts) == 0
