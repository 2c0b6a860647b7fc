"""What a solver found out, in words that a manifest can hold."""

from __future__ import annotations

from typing import Any

from mergepipe.tasks.method import State
from mergepipe.tasks.subspace.route import ROUTES


def readable(state: State) -> dict[str, Any]:
    """The findings of a whole-matrix tensor; empty for all others.

    Returns
    -------
    dict
        `route`; `ranks` kept of each task vector, or of the merge that each model was projected on; `spanned`, the
        dimensions of the left and the right frame; `conditioning`, their smallest kept over largest squared singular
        value; `protected`, how many of the merge's directions were closed to each model; `gram_steps_repeated`;
        `directions_lost`, those asked for that turned out to be zero or dependent on others.
    """
    if "subspace_route" not in state:
        return {}
    found: dict[str, Any] = {
        "route": ROUTES[int(state["subspace_route"][0])],
        "ranks": state["subspace_ranks"].tolist(),
    }
    if "subspace_protected" in state:
        found["protected"] = state["subspace_protected"].tolist()
    else:
        found["spanned"] = state["subspace_spanned"].tolist()
        found["conditioning"] = [float(f"{value:.6g}") for value in state["subspace_conditioning"]]
    return found | {
        "gram_steps_repeated": int(state["subspace_repeated"][0]),
        "directions_lost": int(state["subspace_lost"][0]),
    }
