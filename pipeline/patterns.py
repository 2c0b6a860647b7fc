"""Regular expressions that come from recipes, adapters and options: compiled only if they end in time.

Python's matcher goes back and tries again. A repeat inside a repeat, or a repeated choice, may have it try a number of
ways that doubles with every character of a tensor's name, and many repeats in a row a high power of its length.
"""

from __future__ import annotations

import re
import warnings

MAX_CHARACTERS = 1000
MAX_REPEATS = 6

_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?#[^)]*\)|\(|\)|\||[*+]|\{\d*,\d*\}|\{\d+\}|.", re.DOTALL)


def compile_pattern(text: str) -> re.Pattern[str]:
    """The compiled expression.

    Parameters
    ----------
    text : str
        As :mod:`re` has it.

    Returns
    -------
    re.Pattern

    Raises
    ------
    ValueError
        If it is none, or one that may take for ever on some name; says which.

    Examples
    --------
    >>> compile_pattern(r"layers\\.\\d+\\.(self_attn|mlp)").search("model.layers.12.mlp.up_proj.weight") is not None
    True
    >>> compile_pattern("(([a-z])+)+!")
    Traceback (most recent call last):
    ValueError: '(([a-z])+)+!' may take for ever: it repeats a group that has a repeat or a choice in it
    """
    shown = repr(text if len(text) <= 100 else text[:100] + "…")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{shown} has {len(text):,} characters: an expression may have {MAX_CHARACTERS:,}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of set notation that a later Python may have
            compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown} is no regular expression: {error}") from error
    repeats, nested = _repeats(text)
    if nested:
        raise ValueError(f"{shown} may take for ever: it repeats a group that has a repeat or a choice in it")
    if repeats > MAX_REPEATS:
        raise ValueError(f"{shown} may take for ever: it has {repeats} repeats, {MAX_REPEATS} are allowed; use fewer")
    return compiled


def _repeats(text: str) -> tuple[int, bool]:
    """How many repeats a valid expression has, and whether one is of a group that has a repeat or a choice inside."""
    total, nested = 0, False
    inside = [False]
    """For the whole and each open group: whether it has had a repeat or a choice."""
    closed = False
    """Whether the last thing was a group that had one."""
    for token in _TOKEN.findall(text):
        repeats = token in ("*", "+") or (token.startswith("{") and token.endswith("}") and token != "{}")
        if repeats:
            total += 1
            nested |= closed
            inside[-1] = True
        elif token == "|":
            inside[-1] = True
        elif token == "(":
            inside.append(False)
        if token == ")" and len(inside) > 1:
            closed = inside.pop()
            inside[-1] |= closed
        else:
            closed = False
    return total, nested
