"""Names of a model's modules, where the library that runs it calls them otherwise than its files do.

transformers 5 gave many architectures new names of modules; the files that it writes keep the old ones. An adapter has
the names of the modules it was trained on, of whichever time. Which is which is asked of transformers itself (no table
of architectures is kept here): it makes the model without weights, and names each tensor as it does on loading.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

logger = logging.getLogger(__name__)

_COUNTS = ("layer", "block", "depth", "expert", "stage")
"""Parts of the keys of a configuration that say how many modules there are."""


def module_namer(config: Mapping[str, Any], names: Iterable[str]) -> Callable[[str], str | None] | None:
    """How transformers calls the tensors of a model.

    Parameters
    ----------
    config : mapping
        The model's `config.json`.
    names : iterable of str
        Its tensors, as they are stored.

    Returns
    -------
    callable or None
        From a name, old or new, to the one in the model's class; to None where the tensor is put together from several,
        as fused experts are. None if transformers is not installed, does not know the model, or has no names but the
        stored ones.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:
        return None
    model = _without_weights(config, len(list(names)))
    if model is None:
        return None
    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if isinstance(one, WeightRenaming)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    known = model.state_dict()

    def namer(name: str) -> str | None:
        found, fused = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        return found if fused is None and found in known else None

    return namer


def module_names(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """What transformers calls the tensors of a model, as an adapter for it has to call them.

    It is asked in a process of its own: once imported it would take a hundred megabytes for as long as this one lives.

    Parameters
    ----------
    config, names
        As for :func:`module_namer`.

    Returns
    -------
    dict of str to str
        By stored name, for those that are called otherwise. Empty if transformers is not installed or does not say.
    """
    if importlib.util.find_spec("transformers") is None or "model_type" not in config:
        return {}
    return dict(_ask(json.dumps({"config": dict(config), "names": list(names)})))


@lru_cache(maxsize=4)
def _ask(question: str) -> Mapping[str, str]:
    """What :func:`_answer` says in another process: seconds, so that nothing is asked twice."""
    asked = subprocess.run(
        [sys.executable, "-m", __name__], input=question, capture_output=True, check=False, encoding="utf-8"
    )
    if asked.returncode:
        logger.warning("transformers can't say what it calls the modules: %s", asked.stderr[-300:])
        return {}
    found: dict[str, str] = json.loads(asked.stdout.splitlines()[-1])
    return found


def _without_weights(config: Mapping[str, Any], tensors: int) -> Any:
    """The model on torch's meta device; None if transformers can't make it."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else ""
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if cls is None or not _is_model(cls) or kind not in CONFIG_MAPPING or _largest_count(config) > tensors:
        return None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            return cls(CONFIG_MAPPING[kind].from_dict(dict(config)))
    except Exception as error:  # a configuration is a stranger's, and each class checks its own keys
        logger.info("transformers can't make the model of %s: %s", kind, error)
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)


def _is_model(cls: Any) -> bool:
    import transformers

    return isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)


def _largest_count(value: Any, key: str = "") -> int:
    """The largest number of modules of a kind that a configuration asks for: a stranger may ask for billions."""
    if isinstance(value, Mapping):
        return max((_largest_count(one, str(name)) for name, one in value.items()), default=0)
    if isinstance(value, list):
        return max((_largest_count(one, key) for one in value), default=0)
    counts = type(value) is int and any(word in key for word in _COUNTS)
    return value if counts else 0


def _answer(question: str) -> str:
    """The other end of :func:`module_names`."""
    asked = json.loads(question)
    namer = module_namer(asked["config"], asked["names"])
    called = {name: namer(name) for name in asked["names"]} if namer is not None else {}
    return json.dumps({name: found for name, found in called.items() if found not in (None, name)})


if __name__ == "__main__":
    sys.stdout.write(_answer(sys.stdin.read()) + "\n")
