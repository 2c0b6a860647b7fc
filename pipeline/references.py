"""How a recipe names a model: ``FOLDER``, ``FILE`` or ``org/name[@revision]``, and ``+ADAPTER`` of the same kinds.

What exists on disk wins: a folder whose name has a plus or an at sign is that folder, and what looks like a hub id but
is a folder is the folder. Local paths are made absolute, so that the text of a reference names the same thing from
everywhere.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class Reference:
    """A model, and the adapter that is to be applied to it, if any: absolute paths, or hub ids."""

    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        """As it stands in a recipe; :func:`parse_reference` takes it back."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"

    @property
    def label(self) -> str:
        """Short, for messages and file names: the last part of each path.

        Examples
        --------
        >>> Reference("/models/llama", "org/lora@main").label
        'llama+lora'
        """
        parts = [self.model] if self.adapter is None else [self.model, self.adapter]
        return "+".join(Path(split_revision(part)[0]).name for part in parts)


def parse_reference(text: str, root: str | Path = "/") -> Reference:
    """The models that a text names; relative paths start from `root`.

    Examples
    --------
    >>> parse_reference("./base+./lora", "/models")
    Reference(model='/models/base', adapter='/models/lora')
    >>> parse_reference("org/base@v1+org/lora", "/models")
    Reference(model='org/base@v1', adapter='org/lora')
    """
    places = [at for at, letter in enumerate(text) if letter == "+"]
    if not places or os.path.exists(os.path.join(root, text)):
        return Reference(_place(text, root))
    known = (at for at in places if os.path.exists(os.path.join(root, text[:at])))
    at = next(known, places[0])
    return Reference(_place(text[:at], root), _place(text[at + 1 :], root))


def _place(text: str, root: str | Path) -> str:
    path = os.path.abspath(os.path.join(root, text))
    # A folder that is there for the first half is meant even if the second is misspelt: no hub is asked then.
    first = os.path.join(root, text.partition("/")[0])
    is_hub = _HUB_ID.fullmatch(text) and not os.path.exists(path) and not os.path.exists(first)
    return text if is_hub else path


def is_hub_id(text: str) -> bool:
    """Whether one part of a parsed reference is a hub id."""
    return not os.path.isabs(text)


def split_revision(hub_id: str) -> tuple[str, str | None]:
    """Name and revision of a hub id.

    Examples
    --------
    >>> split_revision("org/name@v1"), split_revision("org/name")
    (('org/name', 'v1'), ('org/name', None))
    """
    name, _, revision = hub_id.partition("@") if is_hub_id(hub_id) else (hub_id, "", "")
    return name, revision or None
