"""Every merge method and every sparsifier, by name. Adding one is a file and a row here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mergepipe.errors import UsageError
from mergepipe.tasks.method import MergeMethod, Sparsifier
from mergepipe.tasks.methods import (
    arcee_fusion,
    breadcrumbs,
    breadcrumbs_ties,
    consensus,
    dare_linear,
    dare_ties,
    dc_merge,
    della,
    della_linear,
    emr_unified,
    fisher,
    iso_c,
    iso_cts,
    karcher,
    linear,
    mda,
    model_stock,
    multislerp,
    nearswap,
    nuslerp,
    opcm,
    passthrough,
    pcb,
    ram,
    ramplus_tl,
    robustmerge,
    sce,
    scf_rkl,
    slerp,
    task_arithmetic,
    ties,
    tsv_m,
)
from mergepipe.tasks.sparsify import SPARSIFIERS as SPARSIFIERS

METHODS: dict[str, MergeMethod] = {
    row.name: row
    for row in (
        linear.METHOD,
        slerp.METHOD,
        nuslerp.METHOD,
        multislerp.METHOD,
        karcher.METHOD,
        fisher.METHOD,
        task_arithmetic.METHOD,
        ties.METHOD,
        dare_linear.METHOD,
        dare_ties.METHOD,
        breadcrumbs.METHOD,
        breadcrumbs_ties.METHOD,
        della.METHOD,
        della_linear.METHOD,
        sce.METHOD,
        ram.METHOD,
        ramplus_tl.METHOD,
        model_stock.METHOD,
        nearswap.METHOD,
        consensus.METHOD,
        pcb.METHOD,
        emr_unified.METHOD,
        scf_rkl.METHOD,
        arcee_fusion.METHOD,
        mda.METHOD,
        tsv_m.METHOD,
        iso_c.METHOD,
        iso_cts.METHOD,
        dc_merge.METHOD,
        opcm.METHOD,
        robustmerge.METHOD,
        passthrough.METHOD,
    )
}

T = TypeVar("T")


def method(name: str) -> MergeMethod:
    """The merge method of this name.

    Raises
    ------
    UsageError
        If there is none; the message gives the nearest name.

    Examples
    --------
    >>> method("ties").title
    'TIES-Merging'
    >>> method("tiess")
    Traceback (most recent call last):
    ...
    mergepipe.errors.UsageError: there is no merge method 'tiess'; did you mean 'ties'?
    """
    return _find(METHODS, name, "merge method")


def sparsifier(name: str) -> Sparsifier:
    """The sparsifier of this name.

    Raises
    ------
    UsageError
        If there is none; the message gives the nearest name.
    """
    return _find(SPARSIFIERS, name, "sparsifier")


def trim_parameters(
    merge_method: MergeMethod, model_params: Sequence[Mapping[str, Any]]
) -> tuple[Mapping[str, Any], ...]:
    """The parameters of the sparsifier that a method brings along (`trim`), picked out of the method's own.

    Parameters
    ----------
    merge_method : MergeMethod
    model_params : sequence of mapping
        The method's per-model parameters, one mapping per model.

    Returns
    -------
    tuple of mapping
        For `Job.sparsify_params`.

    Examples
    --------
    >>> trim_parameters(method("ties"), [{"weight": 1.0, "density": 0.2, "tie_rule": "keep", "rescale": False}])
    ({'density': 0.2, 'tie_rule': 'keep', 'rescale': False},)
    """
    names = [parameter.name for parameter in SPARSIFIERS[merge_method.trim].parameters]
    return tuple({name: params[name] for name in names} for params in model_params)


def _find(table: Mapping[str, T], name: str, kind: str) -> T:
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, 1)
    remedy = f"did you mean {near[0]!r}?" if near else "there are " + ", ".join(sorted(table))
    raise UsageError(f"there is no {kind} {name!r}; {remedy}")
