"""Open files: how many a merge needs at once, and the limit that the system sets.

Every unfinished output file is open from the beginning, so that its space is set aside; inputs are opened as they are
read, the latest few kept open, however many files they have. Shells allow 1,024 as a rule, which a 70B model in files
of 250 MB exceeds; each process may raise that up to the hard limit by itself.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

from mergepipe.errors import BudgetError
from mergepipe.pipeline.plan import Plan

PER_FILE = 3
"""Descriptors of one output file: through the page cache, past it, and that which reads it back."""

OTHERS = 384
"""Inputs (three readers of 64, and what more is in use at once), statistics, journal, libraries."""


def needed(plan: Plan) -> int:
    """Files open at once in the stage of a plan that has most, at the most."""
    return OTHERS + max(PER_FILE * (len(stage.groups) + len(stage.models) + len(stage.side)) for stage in plan.stages)


def check_descriptors(plans: Sequence[Plan]) -> None:
    """Refuse plans of more output files than can be open at once.

    Raises
    ------
    BudgetError
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for plan in plans:
        if hard != resource.RLIM_INFINITY and needed(plan) > hard:
            raise BudgetError(
                f"the output '{plan.output}' has {len(plan.groups):,} files: up to {needed(plan):,} would be open at "
                f"once, and the system allows {hard:,} (`ulimit -Hn`): build with a larger --shard-size, or allow more"
            )


def allow_descriptors(plan: Plan) -> None:
    """Let this process open as many files as a plan needs.

    Raises
    ------
    BudgetError
        If the system does not allow that.
    """
    check_descriptors([plan])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed(plan):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed(plan), hard))
