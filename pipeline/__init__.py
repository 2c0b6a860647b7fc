"""Decides: from a recipe to a plan, from a plan to Dask graphs, and through them to a merged checkpoint.

What it covers
--------------
:mod:`~mergepipe.pipeline.document` reads YAML that nobody vouches for into plain values, within limits.
:mod:`~mergepipe.pipeline.recipe` holds a recipe, typed and checked, and says what it asks for each tensor; the checks
themselves are in :mod:`~mergepipe.pipeline.parsing`, the values that vary over layers or tensor names in
:mod:`~mergepipe.pipeline.values`. :mod:`~mergepipe.pipeline.models` opens the models that it names, whatever stands
between what is stored and their weights: :mod:`~mergepipe.pipeline.quantised` scales of 8-bit codes,
:mod:`~mergepipe.pipeline.adapter` a LoRA adapter, :mod:`~mergepipe.pipeline.hub` a download. A recipe of slices or
modules falls into :mod:`~mergepipe.pipeline.parts`, each a plain recipe over views of its models
(:mod:`~mergepipe.pipeline.stacking`); layers and towers are told by their names (:mod:`~mergepipe.pipeline.towers`).
Where vocabularies differ, :mod:`~mergepipe.pipeline.vocabulary` says which row of which model stands for which token.
:mod:`~mergepipe.pipeline.align` lines the models' tensors up from their headers, :mod:`~mergepipe.pipeline.planning`
makes a plan of that (looking once at tensors of one kind, :mod:`~mergepipe.pipeline.kinds`),
:mod:`~mergepipe.pipeline.build` checks its memory, its disk space
(:mod:`~mergepipe.pipeline.space`) and what is in its way, and :mod:`~mergepipe.pipeline.stores` puts it into a
workspace. From there graphs and the run follow: :mod:`~mergepipe.pipeline.reading` settles how inputs are read, large
ones after a look at the disk (:mod:`~mergepipe.pipeline.probe`), and :mod:`~mergepipe.pipeline.workers` take tensors
in the order of the output. A recipe of several documents is a :mod:`~mergepipe.pipeline.chain` of such merges: planned
from what earlier plans will have made (:mod:`~mergepipe.pipeline.chain_plan`), run one after the other
(:mod:`~mergepipe.pipeline.chain_run`). One merge may have two stages (:mod:`~mergepipe.pipeline.stages`);
:mod:`~mergepipe.pipeline.add` plans one that goes on from a finished merge.

Where a GPU works is settled in :mod:`~mergepipe.pipeline.devices` and :mod:`~mergepipe.pipeline.scoring`; what a merge
found out about each tensor is told by :mod:`~mergepipe.pipeline.diagnostics`, and how each has changed measured by
:mod:`~mergepipe.pipeline.changes`, what a trim has kept of it by :mod:`~mergepipe.pipeline.kept_norms`, both in
sweeps that come :mod:`~mergepipe.pipeline.afterwards`.

Everything up to the plan is a function of the recipe and of headers: no byte of a tensor is read before `run`, and
whatever is wrong with a recipe or a set of checkpoints is found, and reported all at once, before any work is done.

What it does not cover
----------------------
No arithmetic (that is :mod:`mergepipe.tasks`), no file format (:mod:`mergepipe.storage`), and no word on a screen:
progress is events, and the command line is one listener.
"""
