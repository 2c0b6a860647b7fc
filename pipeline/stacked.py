"""What a stack of slices means for the model as a whole: the configuration that is kept has to describe it.

The configuration is that of the recipe's first source. Outside the layers the output must have the tensors that this
model has, and its layers must be such as this model has; how many there are, and what is listed for each of them, is
written into the configuration.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from mergepipe.pipeline.stacking import View, only_in_first, within_layer
from mergepipe.pipeline.towers import count_places
from mergepipe.pipeline.values import layer_counts, stack_of

if TYPE_CHECKING:
    from mergepipe.storage.checkpoint import Checkpoint

LISTED = frozenset({"layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "attention_layers"})
"""Keys with one value for each layer, whatever the values look like; others are told by :func:`_listing`."""

LAYER_WORDS = ("layer", "idx", "indices", "indexes")
"""Parts of keys whose lists are about layers."""

MANY = 12
"""Layers from which on a list of numbers that is as long as there are layers is no coincidence."""

BY_NUMBER = (
    *("first_k_dense_replace", "decoder_sparse_step", "moe_layer_freq", "full_attention_interval"),
    *("sliding_window_pattern", "attn_layer_period", "expert_layer_period", "interleave_moe_layer_step"),
    *("global_attn_every_n_layers", "moe_layer_start_index", "moe_layer_interval"),
)
"""Keys that say by its number what a layer is: nothing can be written there for a layer that comes from elsewhere."""

Layer = tuple[str, int]
"""A model's path and the number of one of its layers."""

Shapes = Mapping[str, tuple[int, ...]]


class Stack:
    """The slices of one tower, as a whole.

    Parameters
    ----------
    views : sequence of View
        Of all its slices, in order.
    path : str
        The recipe's first source, whose configuration is kept.
    first : Checkpoint
    """

    def __init__(self, views: Sequence[View], path: str, first: Checkpoint) -> None:
        self.path = path
        self.first = first
        self.module = views[0].part.module
        self.stack = views[0].stack or ""
        self.views = views

    @property
    def layers(self) -> list[Layer]:
        """For each layer of the output, the model and the layer that lend it its shape."""
        found: list[Layer] = []
        for view in self.views:
            source = view.part.recipe.sources[0]
            start, stop = view.part.ranges[source]
            found += [(source, number) for number in range(start, stop)]
        return found

    @property
    def count(self) -> int:
        """Layers that the model has whose configuration is kept; 0 if it has no such stack."""
        return layer_counts(self.first.tensors).get(self.stack, 0)

    def problems(
        self, made: Shapes, expected: Shapes, left_out: Collection[str], by_token: Collection[str] = ()
    ) -> dict[str, str]:
        """What the kept configuration does not describe, with remedies.

        Parameters
        ----------
        made : mapping of str to tuple of int
            Shapes of the tensors that the slices make, by name.
        expected : mapping of str to tuple of int
            Shapes of the tensors of the same tower in the first source.
        left_out : collection of str
            Names left out with a note, or that need not be there.
        by_token : collection of str
            Names of tensors with a row per token, where the recipe leaves vocabularies as they are.
        """
        remedy = f"the configuration of '{self.path}' is kept, and slices have to fit it: name another `base_model`"
        if not self.count:
            return {f"the slices are of '{self.stack}', of which '{self.path}' has none": remedy}
        found = {}
        known: dict[str, set[tuple[int, ...]]] = {}
        for name, shape in expected.items():
            known.setdefault(self._kind(name), set()).add(shape)
        for name, shape in made.items():
            shapes = known.get(self._kind(name))
            if shapes is None:
                found[f"the slices make '{name}', such as '{self.path}' has none"] = remedy
            elif shape not in shapes:
                there = " or ".join(str(shape) for shape in sorted(shapes))
                vocabulary = "for vocabularies that differ, say `tokenizer_source: union` or `base`"
                text = f"the slices make '{name}' of {shape}, in '{self.path}' it is {there}"
                found[text] = vocabulary if name in by_token else remedy
        alone = {f"{self.stack}.0.{kind}" for kind in only_in_first(expected, self.stack)}
        for name in expected:
            if name not in made and name not in left_out and (stack_of(name) != self.stack or name in alone):
                found[f"'{name}' is in '{self.path}' but in no slice"] = remedy
        return found

    def _kind(self, name: str) -> str:
        """The same for a tensor in all layers."""
        return "." + within_layer(name, self.stack) if stack_of(name) == self.stack else name

    def changes(self, configs: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Any], list[str]]:
        """What changes in the first source's configuration, as nested mappings of new values, and notes.

        Parameters
        ----------
        configs : mapping of str to mapping
            The configuration of every source, by its path.
        """
        config = configs[self.path]
        places = count_places(config, self.stack, self.module, self.count)
        changes: dict[str, Any] = {}
        notes: list[str] = []
        if self.layers == [(self.path, number) for number in range(self.count)]:
            return changes, notes
        if not places and config and len(self.layers) != self.count:
            notes.append(
                f"config.json of '{self.path}' does not say that it has {self.count} layers: that there are "
                f"{len(self.layers)} now has to be written there by hand"
            )
        for place in places:
            _put(changes, place, len(self.layers))
        for section in dict.fromkeys(place[:-1] for place in places):
            for key, value in self._lists(section, configs).items():
                _put(changes, (*section, key), value)
            by_number = [key for key in BY_NUMBER if _at(config, section).get(key) not in (None, 0, 1)]
            if by_number:
                notes.append(f"`{'`, `'.join(by_number)}` in config.json go by a layer's number: check them")
        return changes, notes

    def _lists(self, section: tuple[str, ...], configs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """New values of what one part of the configuration lists for the layers."""
        own = _at(configs[self.path], section)
        found: dict[str, Any] = {}
        for key, value in own.items():
            if not isinstance(value, list):
                continue
            kind = _listing(key, value, self.count)
            lists = {path: _at(config, section).get(key) for path, config in configs.items()}
            if kind == "numbers":
                of = {path: listed if isinstance(listed, list) else [] for path, listed in lists.items()}
                found[key] = [new for new, (path, old) in enumerate(self.layers) if old in of[path]]
            elif kind == "values":
                found[key] = [_nth(lists[path], old, value) for path, old in self.layers]
        return found


def _listing(key: str, value: list[Any], layers: int) -> Literal["numbers", "values"] | None:
    """Whether a list of a configuration has numbers of layers, a value for each layer, or nothing to do with them.

    Examples
    --------
    >>> _listing("mlp_only_layers", [0, 3], 4), _listing("layer_types", ["full", "sliding"], 2)
    ('numbers', 'values')
    >>> _listing("eos_token_id", [1, 2, 5], 3), _listing("architectures", ["LlamaForCausalLM"], 1)
    (None, None)
    """
    about = any(word in key for word in LAYER_WORDS)
    whole = all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    if about and key not in LISTED and whole and value == sorted({*value} & {*range(layers)}):
        return "numbers"
    if len(value) != layers or key == "architectures" or "token" in key:
        return None
    words = all(isinstance(item, str) for item in value)
    flat = not any(isinstance(item, list | dict) for item in value)
    return "values" if key in LISTED or words or (flat and (about or layers >= MANY)) else None


def _nth(values: object, number: int, otherwise: list[Any]) -> Any:
    """The value for a layer; of a model that lists none, that of the first source."""
    chosen = values if isinstance(values, list) and number < len(values) else otherwise
    return chosen[min(number, len(chosen) - 1)]


def _at(config: Mapping[str, Any], section: tuple[str, ...]) -> Mapping[str, Any]:
    for key in section:
        inner = config.get(key)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _put(changes: dict[str, Any], place: tuple[str, ...], value: Any) -> None:
    for key in place[:-1]:
        changes = changes.setdefault(key, {})
    changes[place[-1]] = value
