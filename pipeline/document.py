"""Plain values out of YAML that nobody vouches for.

Only the safe types, no tags, no second document unless several are asked for, no key twice, and limits on length,
nesting and on what aliases expand to. All of that is checked on the stream of parse events, which grows with the text
only, before anything is built from it.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mergepipe.errors import Fault, RecipeError, UsageError

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ALIASES = 256
MAX_DOCUMENTS = 64
MAX_NODES = 200_000
"""Nodes of a document, each alias counted as all that it stands for."""

_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):  # type: ignore[misc]  # the C loader where PyYAML was built with it
    """Safe types, with two of YAML 1.1's surprises taken out: 1e-5 is a number, and 2024-01-01 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in _SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_document(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises
    ------
    RecipeError
        If it is no regular file, longer than 1 MiB, or no safe YAML mapping.
    """
    return read_document(_text_of(path), str(path))


def load_documents(path: Path) -> list[dict[str, Any]]:
    """The mappings that a YAML file of one or several documents holds.

    Raises
    ------
    RecipeError
        As for :func:`load_document`; or if one of several documents is empty.
    """
    return read_documents(_text_of(path), str(path))


def _text_of(path: Path) -> str:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise _fault(f"{path} is no regular file: give the path of a YAML recipe")
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _fault(f"there is no recipe at {path}: write one, or let `mergepipe init` do it") from None
    except (OSError, ValueError) as error:
        raise _fault(f"{path} can't be read: {error}") from None
    if len(raw) > MAX_BYTES:
        raise _fault(f"{path} is longer than {MAX_BYTES:,} bytes: that is no recipe")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _fault(f"{path} is not UTF-8 text (byte {error.start}): that is no recipe") from None


def read_document(text: str, where: str) -> dict[str, Any]:
    """The mapping that a YAML text holds; `where` is what messages call the text.

    Raises
    ------
    RecipeError
        If the text is too long, or no safe YAML mapping.

    Examples
    --------
    >>> read_document("merge_method: linear", "recipe")
    {'merge_method': 'linear'}
    """
    return _mapping(_load(text, where)[0], where)


def read_documents(text: str, where: str) -> list[dict[str, Any]]:
    """The mappings that a YAML text of one or several documents holds.

    Raises
    ------
    RecipeError
        If the text is too long, no safe YAML, or any of its documents no mapping.

    Examples
    --------
    >>> read_documents("{name: a}\\n---\\n{name: b}", "recipe")
    [{'name': 'a'}, {'name': 'b'}]
    """
    documents = _load(text, where, several=True)
    if len(documents) == 1:
        return [_mapping(documents[0], where)]
    return [_mapping(document, f"document {number} of {where}") for number, document in enumerate(documents, start=1)]


def _mapping(document: Any, where: str) -> dict[str, Any]:
    if document is None:
        raise _fault(f"{where} is empty: it needs at least `merge_method` and `models`")
    if not isinstance(document, dict):
        raise _fault(f"{where} holds {_kind(document)}: expected a mapping with `merge_method` and `models`")
    return document


def apply_overrides(document: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of the document with some values set.

    Parameters
    ----------
    document : dict
        Plain values. Not modified.
    overrides : sequence of str
        ``path=value``, the path as in messages about recipes, the value in YAML.

    Raises
    ------
    UsageError
        If an override has no ``=``, or its path does not fit the document.

    Examples
    --------
    >>> recipe = {"models": [{"model": "a"}, {"model": "b"}]}
    >>> apply_overrides(recipe, ["parameters.lambda=0.5", "models[1].model=c"])
    {'models': [{'model': 'a'}, {'model': 'c'}], 'parameters': {'lambda': 0.5}}
    """
    result = copy.deepcopy(document)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: expected key=value, such as parameters.lambda=0.5")
        try:
            value = _load(text, f"--set {path}")[0]
        except RecipeError as error:
            raise UsageError(f"--set {override}: {error.faults[0].message}") from None
        _set(result, _steps(path, override), value, override)
    return result


def _load(text: str, where: str, *, several: bool = False) -> list[Any]:
    """The values of all documents; None for an empty text."""
    if len(text) > MAX_BYTES:
        raise _fault(f"{where} is longer than {MAX_BYTES:,} bytes: that is no recipe")
    try:
        _check_events(text, MAX_DOCUMENTS if several else 1)
        loader = _Loader(text)
        try:
            found = []
            while loader.check_node():
                node = loader.get_node()
                faults = list(_duplicates(node, "$"))
                if faults:
                    raise RecipeError(faults)
                found.append(loader.construct_document(node))
            return found or [None]
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise _fault(f"{where} is not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        if isinstance(error, RecipeError):
            raise
        raise _fault(f"{where} holds a value that can't be read: {error}") from None


def _check_events(text: str, most: int) -> None:
    """Refuse whatever is deeper, larger or cleverer than a recipe, in one pass that builds nothing."""
    sizes: dict[str, int | None] = {}  # nodes under each anchor; None while it is open
    open_nodes: list[tuple[str | None, int]] = []  # anchor, and the count when it was opened
    count = aliases = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = _line(event)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > most:
                what = "second document" if most == 1 else f"document {documents}"
                raise _fault(f"line {line}: a {what} begins, where there may be {most} at most")
        elif isinstance(event, yaml.AliasEvent):
            aliases += 1
            size = sizes.get(str(event.anchor), 0)
            if size is None:
                raise _fault(f"line {line}: the alias *{event.anchor} stands inside what it refers to")
            count += size
        elif isinstance(event, yaml.NodeEvent):
            count += 1
            _check_tag(event, line)
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, count))
            if event.anchor is not None:
                sizes[event.anchor] = None if isinstance(event, yaml.CollectionStartEvent) else 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                sizes[anchor] = count - before + 1
        if aliases > MAX_ALIASES or count > MAX_NODES or len(open_nodes) > MAX_DEPTH:
            raise _fault(
                f"line {line}: more than a recipe may hold (at most {MAX_NODES:,} values, aliases expanded, "
                f"{MAX_ALIASES} aliases and {MAX_DEPTH} levels)"
            )


def _line(part: Any) -> int:
    """Line of an event or a node, from 1."""
    return int(part.start_mark.line) + 1


def _check_tag(event: Any, line: int) -> None:
    tag = getattr(event, "tag", None)
    # "!" alone is what a quoted scalar carries in some parsers: no type is asked for.
    if tag is not None and tag != "!":
        raise _fault(f"line {line}: the tag {tag} is not accepted: a recipe is plain values")


def _duplicates(node: yaml.Node, path: str) -> Iterator[Fault]:
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _duplicates(item, f"{path}[{index}]")
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = _line(key)
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key, yaml.ScalarNode) or key.tag != "tag:yaml.org,2002:str":
                yield Fault(path, f"line {line}: keys are words; quote this one if it is meant to be one")
                continue
            if key.value in lines:
                message = f"is given twice, on lines {lines[key.value]} and {line}: keep one"
                yield Fault(f"{path}.{key.value}", message)
            lines[key.value] = line
            yield from _duplicates(value, f"{path}.{key.value}")


def _steps(path: str, override: str) -> list[str | int]:
    """``$.models[0].model`` as ``["models", 0, "model"]``."""
    steps: list[str | int] = []
    for part in path.strip().removeprefix("$.").split("."):
        match = re.fullmatch(r"([\w-]+)((?:\[\d{1,6}\])*)", part)
        if match is None:
            raise UsageError(f"--set {override}: {path!r} is no path; expected one such as models[0].parameters.weight")
        steps.append(match[1])
        steps += [int(index) for index in re.findall(r"\d+", match[2])]
    return steps


def _set(target: Any, steps: list[str | int], value: Any, override: str) -> None:
    path = "$"
    for depth, step in enumerate(steps):
        last = depth == len(steps) - 1
        if isinstance(step, int):
            if not isinstance(target, list):
                raise UsageError(f"--set {override}: {path} is {_kind(target)}, expected a list")
            if step >= len(target):
                raise UsageError(f"--set {override}: {path} has {len(target)} entries, there is no [{step}]")
        elif not isinstance(target, dict):
            raise UsageError(f"--set {override}: {path} is {_kind(target)}, expected a mapping")
        path += f"[{step}]" if isinstance(step, int) else f".{step}"
        if last:
            target[step] = value
        elif isinstance(step, str):
            if target.get(step) is None:
                target[step] = {}
            target = target[step]
        else:
            target = target[step]


def _kind(value: object) -> str:
    """What a value is, in the words of YAML."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    return "nothing" if value is None else repr(value)


def _fault(message: str) -> RecipeError:
    return RecipeError([Fault("$", message)])
