"""LoRA adapters, as PEFT saves them, applied to a model while it is read: ``W + scaling * B @ A``.

What PEFT's `merge_and_unload` makes of a whole model in memory, a merge makes of each block as it comes. An adapter's
factors join the model's own hierarchy, its fully trained modules take the place of the model's, and each target gets a
low-rank adjustment (:mod:`mergepipe.tasks.adjust`). Ranks and scales per module, rsLoRA, DoRA, embeddings, convolutions
and transposed weights (GPT-2) are understood; anything else that an adapter can be is refused by name.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, TensorMismatchError
from mergepipe.pipeline.models import InputModel
from mergepipe.pipeline.patterns import compile_pattern
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry, check_hierarchy, open_weights, read_json
from mergepipe.storage.dtypes import DTYPES
from mergepipe.tasks.adjust import Factor, LowRank

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Beginnings of `init_lora_weights` that take something out of the base before training."""

NOT_UNDERSTOOD = (
    *("layer_replication", "target_parameters", "trainable_token_indices", "lora_bias", "use_qalora", "use_bdlora"),
    *("kasa_config", "monteclora_config", "arrow_config", "alora_invocation_tokens"),
)
"""Keys of an adapter's configuration that make it more than ``W + scaling * B @ A``."""

_PREFIX = "base_model.model."
_PART = re.compile(
    r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)
_WRAPPERS = re.compile(r"\.(modules_to_save(\.default)?|base_layer)(?=\.)")
_MAX_SHOWN = 5


@dataclass(slots=True)
class _Update:
    """The parts of one target module: entries of the adapter by part, under the names that they have there."""

    module: str
    parts: dict[str, TensorEntry] = field(default_factory=dict)


def apply_adapter(model: InputModel, folder: Path) -> InputModel:
    """The model with an adapter on top. No tensor is read.

    Parameters
    ----------
    model : InputModel
    folder : Path
        With `adapter_config.json` and `adapter_model.safetensors` or `.bin`.

    Raises
    ------
    CheckpointNotFoundError
        If one of them is missing.
    CheckpointError
        If the adapter is of a kind that is not understood.
    TensorMismatchError
        If it targets what the model does not have, or in another shape.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointNotFoundError(f"'{folder}' holds no {CONFIG}: after the + a LoRA adapter is expected")
    config = read_json(folder / CONFIG, strict=False)
    _check_config(config, folder)
    name = next((name for name in WEIGHTS if os.path.lexists(folder / name)), None)
    if name is None:
        raise CheckpointNotFoundError(f"'{folder}' holds neither {' nor '.join(WEIGHTS)}")
    return _Application(model, open_weights(folder / name), config, folder).result()


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"'{folder}' is a {kind!r} adapter: this version applies LORA adapters only")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(CHANGES_THE_BASE):
        raise CheckpointError(
            f"'{folder}' was started with init_lora_weights={start!r}, which changes the base itself: save it again "
            "with `path_initial_model_for_weight_conversion`, which makes it a plain adapter"
        )
    found = [key for key in NOT_UNDERSTOOD if config.get(key)]
    if found:
        raise CheckpointError(
            f"'{folder}' uses {', '.join(found)}, which this version does not understand: merge it with PEFT's "
            "merge_and_unload, and give the folder of the result"
        )


class _Application:
    """Applies one adapter to one model."""

    def __init__(self, model: InputModel, adapter: Checkpoint, config: Mapping[str, Any], folder: Path) -> None:
        self.model = model
        self.adapter = adapter
        self.config = config
        self.folder = folder
        self.updates: dict[str, _Update] = {}
        self.saved: dict[str, TensorEntry] = {}

    def result(self) -> InputModel:
        self._sort()
        rename = self._naming()
        first = len(self.model.stored.files)
        moved = {name: replace(entry, file=entry.file + first) for name, entry in self.adapter.tensors.items()}
        tensors, stored = dict(self.model.tensors), dict(self.model.stored.tensors)
        adjust = dict(self.model.adjust)
        for name, entry in self.saved.items():
            target = rename(name)
            self._check_new(target)
            tensors[target] = stored[target] = replace(moved[entry.name], name=target)
            adjust.pop(target, None)
        changed: dict[str, str] = {}
        for update in self.updates.values():
            target = rename(f"{update.module}.weight")
            if target in changed:
                raise CheckpointError(f"'{self.folder}' has two updates of '{target}': '{changed[target]}' is one")
            changed[target] = update.module
            adjust[target] = (*adjust.get(target, ()), self._low_rank(update, tensors[target]))
            for entry in update.parts.values():
                if entry.name in stored:
                    raise CheckpointError(f"'{self.folder}': '{entry.name}' is a tensor of '{self.model.root}', too")
                stored[entry.name] = moved[entry.name]
        check_hierarchy(self.folder, stored)
        files = (*self.model.stored.files, *self.adapter.files)
        return replace(
            self.model,
            files=files,
            tensors=tensors,
            stored=replace(self.model.stored, files=files, tensors=stored),
            adjust=adjust,
            adapter=str(self.folder),
        )

    # -- what the adapter holds

    def _sort(self) -> None:
        """Tell factors from tensors that are whole."""
        for key, entry in self.adapter.tensors.items():
            name = key.removeprefix(_PREFIX)
            found = _PART.fullmatch(name)
            if found is not None:
                self.updates.setdefault(found[1], _Update(found[1])).parts[found[2]] = entry
            elif "lora_" in name or "token_adapter" in name:
                raise CheckpointError(
                    f"'{self.folder}': '{key}' is no part of an adapter that this version understands"
                )
            elif ".original_module." not in name:
                self.saved[_WRAPPERS.sub("", name)] = entry
            if DTYPES[entry.dtype].role == "refused" or (found is not None and DTYPES[entry.dtype].role != "merged"):
                raise CheckpointError(f"'{self.folder}': '{key}' is {entry.dtype}: expected floating-point numbers")
        if not self.updates and not self.saved:
            raise CheckpointError(f"'{self.folder}' holds no tensors")

    def _naming(self) -> Callable[[str], str]:
        """From names of the adapter to names of the checkpoint.

        An adapter has the names of the class that was trained. A checkpoint has them, too, or those that the class had
        when the format was made; or it is of the model inside that class, or around it.
        """
        targets = [f"{module}.weight" for module in self.updates]
        if all(name in self.model.tensors for name in targets):
            return lambda name: name
        renamed = self._renamed()
        if all(renamed(name) in self.model.tensors for name in targets):
            return renamed
        return self._moved([name for name in targets if name not in self.model.tensors])

    def _renamed(self) -> Callable[[str], str]:
        """By what the class of the model calls each of the two."""
        from mergepipe.pipeline.module_names import module_namer

        namer = module_namer(self.model.config, self.model.tensors)
        if namer is None:
            return lambda name: name
        stored = {called: name for name in self.model.tensors if (called := namer(name)) is not None}

        def renamed(name: str) -> str:
            called = namer(name)
            return name if name in self.model.tensors or called is None else stored.get(called, name)

        return renamed

    def _moved(self, missing: Sequence[str]) -> Callable[[str], str]:
        """By another beginning of the names: as little is taken off as possible, and never a number."""
        first = missing[0].split(".")
        whole = next((at for at, part in enumerate(first) if part.isdigit()), len(first) - 2)
        for cut in range(max(whole, 0) + 1):
            old = "".join(f"{part}." for part in first[:cut])
            ends = missing[0].removeprefix(old)
            news = {name.removesuffix(ends) for name in self.model.tensors if f".{name}".endswith(f".{ends}")}
            fits = [new for new in sorted(news) if all(self._fits(name, old, new) for name in missing)]
            if len(fits) > 1:
                places = " or ".join(f"'{new}{ends}'" for new in fits[:_MAX_SHOWN])
                raise TensorMismatchError(
                    f"'{self.folder}' targets '{missing[0]}', which may be {places} of '{self.model.root}': rename the "
                    "tensors in the adapter as they are called there"
                )
            if fits:
                return lambda name: name if name in self.model.tensors else _exchanged(name, old, fits[0])
        raise TensorMismatchError(
            f"'{self.folder}' targets {len(missing)} tensors that '{self.model.root}' does not have: {_some(missing)}. "
            "Is it an adapter of this model? If the model's class calls its modules otherwise than its files do, "
            "transformers has to be installed, which knows both: `pip install mergepipe[eval]`"
        )

    def _fits(self, name: str, old: str, new: str) -> bool:
        """Whether there is a tensor of the right shape under a name with another beginning."""
        weight = self.model.tensors.get(_exchanged(name, old, new))
        if weight is None or not name.startswith(old):
            return False
        try:
            self._low_rank(self.updates[name.removesuffix(".weight")], weight)
        except TensorMismatchError:
            return False
        return True

    def _check_new(self, name: str) -> None:
        ties = self.model.config.get("tie_word_embeddings") is True or name in self.model.twins
        if name not in self.model.tensors and ties and name.endswith("lm_head.weight"):
            raise TensorMismatchError(
                f"'{self.folder}' brings a '{name}' of its own, but '{self.model.root}' ties it to the embedding: set "
                "tie_word_embeddings to false there, and store the tensor, or leave it out of the adapter"
            )

    # -- one target

    def _low_rank(self, update: _Update, weight: TensorEntry) -> LowRank:
        parts = update.parts
        embedding = "lora_embedding_A" in parts
        a, b = (parts.get(f"lora_{'embedding_' if embedding else ''}{half}") for half in "AB")
        if a is None or b is None:
            raise CheckpointError(f"'{self.folder}': '{update.module}' lacks one of its factors, lora_A and lora_B")
        rank = a.shape[0] if a.shape else 0
        wanted = self._pattern("rank_pattern", update.module, self.config.get("r"))
        if rank < 1 or rank != wanted:
            raise CheckpointError(
                f"'{self.folder}': '{update.module}' has rank {rank}, the rank in {CONFIG} is {wanted}: they must agree"
            )
        turned = self._is_turned(update, weight, a, b, embedding=embedding)
        left, right = (a, b) if turned else (b, a)
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != bool(self.config.get("use_dora")):
            has = "lacks its" if magnitude is None else "has a"
            raise CheckpointError(f"'{self.folder}': '{update.module}' {has} magnitude vector, against use_dora")
        lengths = weight.shape[1] if turned else weight.shape[0]
        if magnitude is not None and math.prod(magnitude.shape) != lengths:
            raise self._misfit(update, weight, magnitude)
        return LowRank(
            Factor(left.name, left.dtype, transposed=turned),
            Factor(right.name, right.dtype, transposed=turned),
            rank,
            self._scaling(update.module, rank),
            None if magnitude is None else Factor(magnitude.name, magnitude.dtype),
            "columns" if turned else "rows",
        )

    def _is_turned(
        self, update: _Update, weight: TensorEntry, a: TensorEntry, b: TensorEntry, *, embedding: bool
    ) -> bool:
        """Whether the weight is stored as (in, out), so that the update is the transpose of B @ A."""
        rank = a.shape[0]
        out, inner = b.shape[0] if b.shape else 0, math.prod(a.shape[1:])
        if math.prod(b.shape) != out * rank or DTYPES[weight.dtype].role != "merged":
            raise self._misfit(update, weight, a, b)
        plain = weight.shape[:1] == (out,) and math.prod(weight.shape[1:]) == inner and len(weight.shape) > 1
        turned = weight.shape == (inner, out)
        if embedding or (turned and (self.config.get("fan_in_fan_out") or not plain)):
            if not turned:
                raise self._misfit(update, weight, a, b)
            return True
        if not plain:
            raise self._misfit(update, weight, a, b)
        return False

    def _misfit(self, update: _Update, weight: TensorEntry, *parts: TensorEntry) -> TensorMismatchError:
        shapes = " and ".join(str(part.shape) for part in parts)
        return TensorMismatchError(
            f"'{self.folder}': '{update.module}' has factors {shapes}, which do not fit '{weight.name}' of "
            f"'{self.model.root}', {weight.dtype} {weight.shape}: is it an adapter of this model?"
        )

    def _scaling(self, module: str, rank: int) -> float:
        alpha = self._pattern("alpha_pattern", module, self.config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"'{self.folder}': lora_alpha of '{module}' is {alpha!r}, expected a number")
        return float(alpha / math.sqrt(rank) if self.config.get("use_rslora") else alpha / rank)

    def _pattern(self, key: str, module: str, default: Any) -> Any:
        """The value of the first pattern that a module's name ends with."""
        patterns = self.config.get(key) or {}
        if not isinstance(patterns, Mapping):
            raise CheckpointError(f"'{self.folder}': {key} is no mapping")
        for pattern, value in patterns.items():
            try:
                compile_pattern(pattern)
            except ValueError as error:
                raise CheckpointError(f"'{self.folder}': {key}: {error}") from error
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default


def _exchanged(name: str, old: str, new: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _some(names: Iterable[str]) -> str:
    names = [f"'{name}'" for name in names]
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return ", ".join(names[:_MAX_SHOWN]) + more
