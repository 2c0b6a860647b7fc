"""What differs between the files beside the merged weights and those of the model that lends them.

That is the base, or the first model. Its files are copied as they are; a merged vocabulary brings a tokenizer of its
own, other ids of special tokens and other sizes in the configuration, and a recipe may ask for a chat template. All of
it is decided by `build`, which keeps the new files in the workspace: a run needs no tokenizer library.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergepipe.pipeline.chat_templates import BUILTIN, TEMPLATE_FILE, most_common, template_of
from mergepipe.pipeline.tokenizers import TOKENIZER_FILES, ids_that_differ, written_files

if TYPE_CHECKING:
    from mergepipe.pipeline.recipe import Recipe
    from mergepipe.pipeline.vocabulary import Vocabulary

TEMPLATE_FILES = (TEMPLATE_FILE, "chat_template.json", "additional_chat_templates")

_IDS = re.compile(r"_token_ids?$|_token_index$|(^|_)suppress_tokens$")
"""Keys of configurations that hold ids of tokens."""

_OWN = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")
"""Special tokens that a tokenizer names itself."""


@dataclass(frozen=True, slots=True)
class Beside:
    """The difference, as a plan keeps it.

    Attributes
    ----------
    files : tuple of str
        Names of files that are taken from the workspace.
    withheld : tuple of str
        Patterns of files that are not copied from the model.
    """

    files: tuple[str, ...] = ()
    withheld: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BesideFiles:
    """The same as `build` decides it.

    Attributes
    ----------
    beside : Beside
    contents : dict of str to bytes
        Of the files that it names.
    config : dict
        New values of `config.json`, in mappings as deep as theirs.
    notes : tuple of str
        What the user should know.
    """

    beside: Beside = field(default_factory=Beside)
    contents: dict[str, bytes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def files_beside(
    recipe: Recipe, vocabulary: Vocabulary | None, staged: Mapping[str, Path] | None = None
) -> BesideFiles:
    """Decide what is written beside the weights.

    Parameters
    ----------
    recipe : Recipe
        The first of its `sources` lends its files.
    vocabulary : Vocabulary or None
    staged : mapping of str to Path, optional
        Where the files of models are that are yet to be made.

    Raises
    ------
    CheckpointError
        If the merged tokenizer can't be written.
    """
    folders = [(staged or {}).get(path) or Path(path) for path in recipe.sources]
    folder = folders[0]
    contents: dict[str, bytes] = {}
    withheld: tuple[str, ...] = ()
    config: dict[str, Any] = {}
    notes: list[str] = []
    if vocabulary is not None:
        merged = vocabulary.merged
        if merged.new or merged.origin is not vocabulary.own[0]:
            contents |= written_files(merged)
            withheld += TOKENIZER_FILES
            if (template := template_of(merged.origin.folder)) is not None:
                contents[TEMPLATE_FILE] = template.encode()
            if merged.origin is not vocabulary.own[0]:
                withheld += TEMPLATE_FILES
        config |= dict.fromkeys(vocabulary.sizes, vocabulary.rows)
        config |= _ids_changed(_read(folder / "config.json"), vocabulary, notes)
        generation = _read(folder / "generation_config.json")
        if changed := _ids_changed(generation, vocabulary, notes):
            contents["generation_config.json"] = _to_json({**generation, **changed})
    else:
        notes += _other_tokens(recipe.sources, folders)
    _put_template(recipe, folders, contents, withheld, notes)
    notes += vocabulary.notes if vocabulary is not None else ()
    beside = Beside(tuple(sorted(contents)), tuple(dict.fromkeys(withheld)))
    return BesideFiles(beside, contents, _nested(config), tuple(dict.fromkeys(notes)))


def _other_tokens(sources: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Rows that stand for other tokens in some model are merged all the same, where nobody asks for tokenizers."""
    notes = []
    for source, folder in zip(sources[1:], folders[1:], strict=True):
        if differing := ids_that_differ(folders[0], folder):
            number, (one, other) = next(iter(differing.items()))
            notes.append(
                f"'{source}' has other tokens than '{sources[0]}' at {len(differing):,} ids, such as {number} "
                f"({other!r}, {one!r}): their rows are merged all the same; `tokenizer_source: union` merges token "
                f"by token"
            )
    return notes


def _nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted keys as mappings in mappings."""
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        *outer, last = key.split(".")
        inner = nested
        for name in outer:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return nested


def _ids_changed(config: Mapping[str, Any], vocabulary: Vocabulary, notes: list[str]) -> dict[str, Any]:
    """The ids of special tokens that are others in the merged vocabulary, by dotted key."""
    own = vocabulary.own[0]
    if own is None:
        return {}
    names = {number: token for token, number in own.vocab.items()}
    changed: dict[str, Any] = {}
    for key, value in _ids_of(config, ""):
        one_by_one = value if isinstance(value, list) else [value]
        found = [vocabulary.merged.ids.get(names.get(number, "")) for number in one_by_one]
        if found == one_by_one:
            continue
        kept = [number for number in found if number is not None]
        if isinstance(value, list) and kept:
            changed[key] = kept
            continue
        new = kept[0] if kept else _named_by_tokenizer(key, vocabulary)
        changed[key] = [new] if isinstance(value, list) and new is not None else new
        if not kept:
            notes.append(f"`{key}` was {value}, which is no token of the merged vocabulary: it is {changed[key]} now")
    return changed


def _named_by_tokenizer(key: str, vocabulary: Vocabulary) -> int | None:
    """The id that the tokenizer itself has for a special token, for a model whose own token is gone."""
    role = key.rpartition(".")[2].partition("_token")[0]
    if role not in _OWN:
        return None
    token = getattr(vocabulary.merged.origin.loaded, f"{role}_token", None)
    return None if token is None else vocabulary.merged.ids.get(str(token))


def _ids_of(config: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _ids_of(value, f"{prefix}{key}.")
        elif _IDS.search(key):
            numbers = value if isinstance(value, list) else [value]
            # A negative number stands for "none" in some configurations.
            if numbers and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers):
                yield prefix + key, value


def _put_template(
    recipe: Recipe, folders: list[Path], contents: dict[str, bytes], withheld: tuple[str, ...], notes: list[str]
) -> None:
    """The chat template that the recipe asks for, in every place that transformers reads one from."""
    wanted = recipe.chat_template
    if wanted is None:
        return
    text = BUILTIN.get(wanted, wanted)
    if wanted == "auto":
        templates = [template_of(folder) for folder in folders]
        found = most_common(templates)
        if found is None:
            notes.append("`chat_template: auto` has no effect: no model has a chat template")
            return
        text = found
        if len(set(templates) - {None}) > 1:
            whose, count = recipe.sources[templates.index(text)], templates.count(text)
            notes.append(f"chat templates differ: that of '{whose}' is taken, which {count} of {len(templates)} have")
    contents[TEMPLATE_FILE] = text.encode()
    for name in ("tokenizer_config.json", "chat_template.json"):
        hidden = any(Path(name).match(pattern) for pattern in withheld)
        values = json.loads(contents[name]) if name in contents else {} if hidden else _read(folders[0] / name)
        if "chat_template" in values:
            contents[name] = _to_json({**values, "chat_template": text})


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
