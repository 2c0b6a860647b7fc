"""The sweeps of coordinate fusion, in order: row statistics, the exact threshold of the scores, and what is taken.

See :mod:`mergepipe.tasks.fusion`; what ``scope: model`` asks of the whole model is in
:mod:`mergepipe.tasks.fusion_rounds`.
"""

from __future__ import annotations

from collections.abc import Iterator

from mergepipe.tasks import fusion_guess, rows
from mergepipe.tasks.fusion import Settings, Stage, stages
from mergepipe.tasks.fusion_rows import row_sweeps
from mergepipe.tasks.fusion_scores import Again, Coarse, Fine, Kept, Ties
from mergepipe.tasks.method import Job, Reduction
from mergepipe.tasks.select import levels


def reductions(settings: Settings, job: Job) -> tuple[Reduction, ...]:
    """The sweeps of all stages, in order."""
    if settings.never_takes(job):
        return ()
    return tuple(sweep for stage in stages(job, settings) for sweep in _sweeps(stage, job))


def _sweeps(stage: Stage, job: Job) -> Iterator[Reduction]:
    settings, guessed = stage.settings, fusion_guess.is_made(stage, job)
    if guessed:
        yield fusion_guess.Sample(stage)
    yield from row_sweeps(stage, job)
    if settings.scope == "tensor":
        # Where a guess is made, it is hardly ever wrong.
        reads = 0.0 if guessed else 1.0
        if guessed:
            yield Again(stage)
        if guessed or rows.is_wide(job):
            yield Coarse(stage, reads)
        for level in range(1, levels(job.work)):
            yield Fine(stage, level, reads)
    exact = settings.tie_rule == "index" and settings.scope == "tensor"
    if exact and settings.threshold == "quantile":
        yield Ties(stage)
    if exact or settings.threshold == "iqr" or settings.scope == "model":
        yield Kept(stage)
