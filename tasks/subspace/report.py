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
        `route`; `ranks` kept of each task vector; `spanned`, the dimensions of the left and the right frame;
        `conditioning`, their smallest kept over largest squared singular value; `gram_steps_repeated`;
        `directions_lost`, those asked for that turned out to be zero or dependent on others.
    """
    if "subspace_route" not in state:
        return {}
    return {
        "route": ROUTES[int(state["subspace_route"][0])],
        "ranks": state["subspace_ranks"].tolist(),
        "spanned": state["subspace_spanned"].tolist(),
        "conditioning": [float(f"{value:.6g}") for value in state["subspace_conditioning"]],
        "gram_steps_repeated": int(state["subspace_repeated"][0]),
        "directions_lost": int(state["subspace_lost"][0]),
    }
