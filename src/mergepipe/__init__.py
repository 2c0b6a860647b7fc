"""mergepipe merges large checkpoints out of core: it streams, and never holds a model.

A merge is two calls, as it is two commands::

    import mergepipe

    plan = mergepipe.build("recipe.yaml", work="w", memory="8GiB")
    result = mergepipe.run("w", on_event=print)  # result.output, result.manifest

:func:`build` checks everything and writes a plan into a workspace; it merges nothing. :func:`run` does what the plan
says. :func:`add_model` plans one more model onto a finished merge that allows it. :func:`open_store` opens the zarr
hierarchy that stands for one model in the workspace. Whatever goes wrong on purpose is a
:class:`mergepipe.errors.MergepipeError`.

The layers below, each in a folder of its own at the top of the repository, import downwards only::

    mergepipe.cli       shows and asks     may import pipeline, tasks, storage
    mergepipe.pipeline  decides            may import tasks, storage
    mergepipe.tasks     computes           may import storage in nodes.py only
    mergepipe.storage   holds bytes        imports nothing of ours but errors

The names here are looked up on first use, so that ``import mergepipe`` costs milliseconds and loads none of the large
libraries. What is not named here is not public.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergepipe import errors

if TYPE_CHECKING:
    from mergepipe.pipeline.add import add_model
    from mergepipe.pipeline.build import build
    from mergepipe.pipeline.run import run
    from mergepipe.storage.virtual import open_store

__version__ = "0.1.0"

__all__ = ["__version__", "add_model", "build", "errors", "open_store", "run"]

_HOME = {
    "add_model": "mergepipe.pipeline.add",
    "build": "mergepipe.pipeline.build",
    "run": "mergepipe.pipeline.run",
    "open_store": "mergepipe.storage.virtual",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mergepipe' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
