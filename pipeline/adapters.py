"""Whether LoRA adapters can be merged with each other: decided from their configurations and the names of tensors.

An adapter stands for the products of its pairs, ``(alpha / r) B A``. Merging all A and all B with a method for whole
models would merge neither these products nor anything else that is meant, so only methods that know of pairs take
adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from mergepipe.storage.checkpoint import Checkpoint, TensorEntry

SAME = ("lora_alpha", "alpha_pattern", "rank_pattern", "use_rslora", "fan_in_fan_out", "bias")
"""What decides how a pair is applied, and so has to be the same in all adapters; the output has one configuration."""


def check_adapters(recipe: Recipe, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse adapters where whole models are merged, models where adapters are, and adapters that do not fit.

    Parameters
    ----------
    recipe : Recipe
    checkpoints : sequence of Checkpoint
        One per `recipe.inputs`.

    Raises
    ------
    CheckpointError
        With all that is wrong.
    """
    from mergepipe.tasks.registry import METHODS

    found = list(zip(recipe.sources, checkpoints, strict=False))
    methods = [recipe.merge_method, *(rule.merge_method for rule in recipe.rules if rule.merge_method is not None)]
    for_adapters = [name for name in methods if METHODS[name].takes == "adapters"]
    adapters = [path for path, checkpoint in found if checkpoint.is_adapter]
    if for_adapters:
        _refuse([path for path, checkpoint in found if not checkpoint.is_adapter], for_adapters[0])
        strange = [name for name in methods if name not in (*for_adapters, "passthrough")]
        if strange:
            raise CheckpointError(f"{strange[0]} can't be mixed with {for_adapters[0]}, which merges LoRA adapters")
        _check_alike(found)
    elif adapters:
        raise CheckpointError(
            f"'{adapters[0]}' is a LoRA adapter, and {recipe.merge_method} merges whole models: the average of factors "
            f"A and B is not the average of their products. Merge adapters with `merge_method: robustmerge`, or merge "
            f"the models they make and take the result apart again with `mergepipe lora-extract`"
        )


def _refuse(models: Sequence[str], method: str) -> None:
    if models:
        raise CheckpointError(
            f"'{models[0]}' is a whole model, and {method} merges LoRA adapters: give folders that hold "
            f"adapter_config.json and adapter_model.safetensors, and no base_model"
        )


def _check_alike(found: Sequence[tuple[str, Checkpoint]]) -> None:
    problems = []
    first_path, first = found[0]
    for path, checkpoint in found:
        config = checkpoint.config
        if config.get("peft_type") != "LORA":
            problems.append(f"'{path}': peft_type is {config.get('peft_type')!r}, only LORA adapters have pairs")
        if config.get("use_dora"):
            problems.append(f"'{path}': a DoRA adapter's magnitudes belong to its own pairs and can't be merged")
        problems += [
            f"'{path}': {key} is {_value(config, key)!r}, in '{first_path}' it is {_value(first.config, key)!r}"
            for key in SAME
            if _value(config, key) != _value(first.config, key)
        ]
    problems += [f"'{path}': {text}" for path, checkpoint in found for text in _odd_pairs(checkpoint.tensors)]
    if problems:
        remedy = "Remedy: train or extract the adapters alike, with `mergepipe lora-extract --rank N` for instance."
        raise CheckpointError("\n".join(["the adapters do not fit together:", *(f"  {p}" for p in problems), remedy]))


def _value(config: Mapping[str, Any], key: str) -> Any:
    """A setting, the same for all ways to say that there is none."""
    return config.get(key) or None


def _odd_pairs(tensors: Mapping[str, TensorEntry]) -> Iterator[str]:
    """Factors without the other one, and pairs that can't be multiplied."""
    from mergepipe.tasks.methods.robustmerge import partner_of, side_of

    for name, entry in tensors.items():
        side = side_of(name)
        other = tensors.get(partner_of(name)) if side else None
        if side and other is None:
            yield f"'{name}' has no counterpart"
        elif side == "A" and other is not None:
            shapes = entry.shape, other.shape
            if min(map(len, shapes)) < 2 or shapes[0][0] != shapes[1][1]:
                yield f"'{name}' is {shapes[0]} and its counterpart {shapes[1]}: no pair of one rank"
