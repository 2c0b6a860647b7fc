"""Towers and stacks: which tensors of a model belong together, told from their names and its configuration.

A *stack* is a run of numbered layers: all tensors whose names are alike up to the first number. A *tower* is a part of
a model of several, such as the text decoder, the vision tower and the projector between them; recipes call towers by
the names that mergekit gives them, by a part of the tensors' names (`visual`), or by the stack (`model.vision.layers`).
No table of architectures is needed; what to do about a name that says nothing is up to the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from mergepipe.pipeline.heads import head_of
from mergepipe.pipeline.values import layer_counts, stack_of

KINDS: dict[str, frozenset[str]] = {
    "projector": frozenset(
        {
            "multi_modal_projector",
            "mm_projector",
            "merger",
            "deepstack_merger_list",
            "connector",
            "projector",
            "aligner",
        }
        | {"embed_vision", "embed_audio"}
    ),
    "vision": frozenset(
        {"vision_tower", "vision_model", "vision_encoder", "vision_backbone", "visual", "image_encoder", "vision"}
    ),
    "audio": frozenset({"audio_tower", "audio_model", "audio_encoder", "audio", "speech_encoder"}),
    "text": frozenset({"text_decoder", "text_model", "text_encoder", "language_model", "llm", "text"}),
    "decoder": frozenset({"decoder"}),
    "encoder": frozenset({"encoder"}),
}
"""Parts of a dotted name that tell a tower, and names of towers in recipes; the first kind that fits counts."""

SIDES = frozenset({"projector", "vision", "audio"})
"""Kinds that make what has no kind the text tower."""

ROOT = frozenset({"default", "shared"})
"""Names for what is in no other tower."""

_USUAL = {
    "projector": "multi_modal_projector",
    "vision": "vision_tower",
    "audio": "audio_tower",
    "text": "text_decoder",
    "decoder": "decoder",
    "encoder": "encoder",
}

COUNT_KEYS: dict[str, str | None] = {
    "num_hidden_layers": None,
    "n_layer": None,
    "n_layers": None,
    "num_layers": None,
    "depth": None,
    "encoder_layers": "encoder",
    "num_encoder_layers": "encoder",
    "decoder_layers": "decoder",
    "num_decoder_layers": "decoder",
}
"""Keys of configurations that hold a number of layers, and the kind of tower they are for."""

_BEFORE = ("embed", "wte", "wpe", "embd", "shared", "token", "patch", "position", "rotary", "inv_freq", "stem", "conv")
_BEFORE_PARTS = frozenset({"ln_pre", "pre_layrnorm", "pre_layernorm", "layernorm_pre", "pre_norm"})
_AFTER = ("norm", "ln_", "head", "pooler", "classifier", "score", "output", "vocab_", "logit", "projection", "probe")
_AFTER_PARTS = frozenset({"decoder", "proj_out"})
_PACKED = "per_layer"


def tower_of(tensor_name: str, modules: Collection[str], kinds: Collection[str]) -> str | None:
    """Which of some modules a tensor belongs to; None for none of them.

    Parameters
    ----------
    tensor_name : str
    modules : collection of str
        Names of towers, as recipes give them.
    kinds : collection of str
        All kinds that the model has (:func:`kinds_of`).

    Examples
    --------
    >>> modules, kinds = ["text_decoder", "vision_tower"], {"vision", "projector"}
    >>> [tower_of(name, modules, kinds) for name in ("model.norm.weight", "visual.blocks.0.w", "visual.merger.w")]
    ['text_decoder', 'vision_tower', None]
    """
    parts = _before_number(tensor_name)
    kind = _kind(parts)
    of_kind = [name for name in modules if kind is not None and name in KINDS[kind]]
    if kind == "projector":
        return of_kind[0] if of_kind else None
    literal = [(at, name) for name in modules if (at := _position(name, parts)) is not None]
    if literal:
        return min(literal, key=lambda found: (found[0], -len(found[1])))[1]
    if of_kind:
        return of_kind[0]
    if kind is None and SIDES & set(kinds):
        found = next((name for name in modules if name in KINDS["text"]), None)
        if found is not None:
            return found
    return next((name for name in modules if name in ROOT), None) if kind is None or "default" in modules else None


def usual_names(kinds: Collection[str]) -> set[str]:
    """What recipes call the towers of a model that has these kinds.

    Examples
    --------
    >>> sorted(usual_names({"vision", "projector"}))
    ['multi_modal_projector', 'text_decoder', 'vision_tower']
    """
    found = {_USUAL[kind] for kind in kinds}
    return found | {_USUAL["text"]} if SIDES & set(kinds) else found


def kinds_of(tensor_names: Iterable[str]) -> set[str]:
    """The kinds of towers that a model has."""
    return {kind for name in tensor_names if (kind := _kind(_before_number(name))) is not None}


def _kind(parts: Collection[str]) -> str | None:
    return next((kind for kind, words in KINDS.items() if not words.isdisjoint(parts)), None)


def _before_number(tensor_name: str) -> list[str]:
    """The parts of a name up to the number of its layer."""
    parts = tensor_name.split(".")
    return parts[: next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))]


def _position(module: str, parts: list[str]) -> int | None:
    """Where among the parts of a name the module's stand; a leading `model` of the module's may be left out."""
    for wanted in (module.split("."), module.removeprefix("model.").split(".")):
        for at in range(len(parts) - len(wanted) + 1):
            if parts[at : at + len(wanted)] == wanted:
                return at
    return None


def main_stacks(tensor_names: Collection[str], config: Mapping[str, Any]) -> list[str]:
    """The stacks that are layers of a tower, and not numbered parts of something else: those with most in each layer.

    Of several, those whose length is a number of layers in the configuration.

    Examples
    --------
    >>> names = [f"h.{n}.{w}" for n in range(3) for w in "abcd"] + ["classifier.0.weight", "classifier.2.weight"]
    >>> main_stacks(names, {})
    ['h']
    """
    counts = layer_counts(tensor_names)
    tensors = dict.fromkeys(counts, 0)
    for name in tensor_names:
        stack = stack_of(name)
        if stack in tensors:
            tensors[stack] += 1
    density = {stack: tensors[stack] / counts[stack] for stack in counts}
    main = [s for s in counts if head_of(s) is None and 3 * density[s] >= max(density.values())]
    stated = {value for _, _, value in layer_numbers(config)}
    return [stack for stack in main if counts[stack] in stated] or main


def layer_numbers(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str, int]]:
    """Every number of layers in a configuration: path of the mapping that it stands in, key, value."""
    for key, value in config.items():
        if key in COUNT_KEYS and isinstance(value, int) and not isinstance(value, bool):
            yield path, key, value
        elif isinstance(value, Mapping) and len(path) < 3:
            yield from layer_numbers(value, (*path, key))


def count_places(config: Mapping[str, Any], stack: str, module: str | None, layers: int) -> list[tuple[str, ...]]:
    """Where a configuration says how many layers a stack has: paths of keys. Empty if it does not say.

    Examples
    --------
    >>> config = {"text_config": {"num_hidden_layers": 4}, "vision_config": {"num_hidden_layers": 4}}
    >>> count_places(config, "language_model.model.layers", "text_decoder", 4)
    [('text_config', 'num_hidden_layers')]
    >>> count_places({"num_layers": 3, "num_decoder_layers": 3}, "decoder.block", "decoder", 3)
    [('num_decoder_layers',)]
    """
    kind = _kind(stack.split(".")) or _kind([module or ""])
    graded: dict[int, list[tuple[str, ...]]] = {}
    for path, key, value in layer_numbers(config):
        of = COUNT_KEYS[key] or _kind([part.removesuffix("_config") for part in path])
        if value == layers and of in (None, kind, "text" if kind is None else kind):
            graded.setdefault(0 if of is not None else 1 + len(path), []).append((*path, key))
    return graded[min(graded)] if graded else []


def side_of(tensor_name: str) -> str | None:
    """Whether a tensor outside the layers comes "before" or "after" them; None if its name does not tell.

    Examples
    --------
    >>> side_of("model.embed_tokens.weight"), side_of("model.norm.weight"), side_of("embed_out.weight"), side_of("gate")
    ('before', 'after', 'after', None)
    """
    if _PACKED in tensor_name:
        return None
    if head_of(tensor_name) is not None:
        return "after"
    parts = tensor_name.lower().split(".")
    if any(word in part for part in parts for word in _BEFORE) or not _BEFORE_PARTS.isdisjoint(parts):
        return "before"
    after = any(word in part for part in parts for word in _AFTER) or not _AFTER_PARTS.isdisjoint(parts)
    return "after" if after else None
