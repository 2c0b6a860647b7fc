"""Tokenizers of models: what ids they give to which tokens, the vocabulary of a merge, and the files that say so.

Files are read and written by the `transformers` and `tokenizers` libraries (extra `tokenizers`), which are imported
when a recipe asks for a vocabulary and not before.
"""

from __future__ import annotations

import filecmp
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, UsageError

LARGEST = 100_000_000
"""Bytes of a `tokenizer.json` that is looked into; the largest of today have 35 million."""

TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken"),
    "tekken.json",
)
"""Files that make up a tokenizer: they go together, or not at all."""

_OF_THIS_MACHINE = ("is_local", "local_files_only", "name_or_path", "_commit_hash")
"""What transformers writes into a tokenizer's configuration about where it was read from."""

_NEVER_CHOSEN = -1e6
"""Added to the worst score of a unigram model: a piece of another tokenizer is never better than the model's own."""


@dataclass(frozen=True, eq=False, slots=True)
class Tokenizer:
    """A model's tokenizer.

    Attributes
    ----------
    path : str
        The model's folder.
    folder : Path
        Where its files are now, which is elsewhere for a model that is yet to be made.
    vocab : dict of str to int
        Id of every token, those added to the vocabulary included.
    loaded : transformers.PreTrainedTokenizerBase
    """

    path: str
    folder: Path
    vocab: dict[str, int]
    loaded: Any

    @property
    def rows(self) -> int:
        """Rows that an embedding needs at the least."""
        return max(self.vocab.values(), default=-1) + 1


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of a folder that belong to its tokenizer, by name."""
    return sorted({path for pattern in TOKENIZER_FILES for path in folder.glob(pattern) if path.is_file()})


def read_tokenizer(path: str, folder: Path | None = None) -> Tokenizer | None:
    """The tokenizer in a model's folder; None if it has no file of one.

    Parameters
    ----------
    path : str
    folder : Path, optional
        Where the files are, if the model is yet to be made.

    Raises
    ------
    UsageError
        If the libraries are not installed.
    CheckpointError
        If they can't read it.
    """
    transformers = _transformers()
    folder = folder or Path(path)
    if not tokenizer_files(folder):
        return None
    try:
        loaded = _load(transformers, folder)
        vocab = {str(token): int(number) for token, number in loaded.get_vocab().items()}
    except Exception as error:  # whatever a file that is not what it should be makes of these libraries
        message = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the tokenizer in '{path}' can't be read: {message}. Repair it, or leave `tokenizer_source` out where all "
            f"models have one vocabulary"
        ) from error
    return Tokenizer(path, folder, vocab, loaded)


def ids_that_differ(one: Path, other: Path) -> dict[int, tuple[str | None, str | None]]:
    """Ids that stand for other tokens in two folders, by their `tokenizer.json` alone, without any library.

    Returns
    -------
    dict
        Id to the token of each, None where one has none; empty if a folder has no such file, or one that does not say.
    """
    first, second = one / "tokenizer.json", other / "tokenizer.json"
    if not (first.is_file() and second.is_file()) or filecmp.cmp(first, second, shallow=False):
        return {}
    mine, theirs = _tokens(first), _tokens(second)
    if not (mine and theirs):
        return {}
    pairs = {number: (mine.get(number), theirs.get(number)) for number in mine.keys() | theirs.keys()}
    return {number: pair for number, pair in sorted(pairs.items()) if pair[0] != pair[1]}


def _tokens(file: Path) -> dict[int, str]:
    """Token by id; nothing where the file is not as expected: only those who use it have to complain."""
    if file.stat().st_size > LARGEST:
        return {}
    try:
        document = json.loads(file.read_bytes())
        vocab = document["model"]["vocab"]
        found = {int(number): str(token) for token, number in vocab.items()}
        return found | {int(added["id"]): str(added["content"]) for added in document.get("added_tokens") or ()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _load(transformers: Any, path: Path) -> Any:
    """As transformers loads it; by `tokenizer.json` alone for a model that this version of it does not know."""
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        return transformers.AutoTokenizer.from_pretrained(path, **options)
    except Exception:
        if not (path / "tokenizer.json").is_file():
            raise
        return transformers.PreTrainedTokenizerFast.from_pretrained(path, **options)


def _transformers() -> Any:
    try:
        import tokenizers  # noqa: F401
        import transformers
    except ImportError as error:
        raise UsageError(
            f"`tokenizer` and `tokenizer_source` need the library {error.name!r}: "
            f"python -m pip install 'mergepipe[tokenizers]'"
        ) from error
    return transformers


@dataclass(frozen=True, eq=False, slots=True)
class MergedVocabulary:
    """The tokens of a merge.

    Attributes
    ----------
    origin : Tokenizer
        The tokenizer it extends: its tokens keep their ids.
    ids : dict of str to int
        Id of every token.
    new : dict of str to (AddedToken or None)
        The tokens that `origin` does not have, in the order of their ids; None for one that is a plain entry of
        another's vocabulary.
    """

    origin: Tokenizer
    ids: dict[str, int]
    new: dict[str, Any] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """One past the largest id."""
        return max(self.ids.values(), default=-1) + 1


def merged_vocabulary(origin: Tokenizer, others: Sequence[Tokenizer], extra: Sequence[str] = ()) -> MergedVocabulary:
    """A vocabulary that begins with a tokenizer's own and goes on with what others have beside it.

    Parameters
    ----------
    origin : Tokenizer
    others : sequence of Tokenizer
        Whose tokens are added, one tokenizer after the other, each in the order of its ids.
    extra : sequence of str
        Tokens that no tokenizer needs to have.
    """
    ids = dict(origin.vocab)
    new: dict[str, Any] = {}
    rows = origin.rows
    for token, added in [*_beside(others), *((token, _plain_added(token)) for token in extra)]:
        if token not in ids:
            ids[token] = rows + len(new)
            new[token] = added
    return MergedVocabulary(origin, ids, new)


def _beside(others: Sequence[Tokenizer]) -> Iterator[tuple[str, Any]]:
    for other in others:
        added = {str(entry): entry for entry in other.loaded.added_tokens_decoder.values()}
        for token in sorted(other.vocab, key=other.vocab.__getitem__):
            yield token, added.get(token)


def _plain_added(token: str) -> Any:
    from tokenizers import AddedToken

    return AddedToken(token, normalized=False, special=False)


def written_files(merged: MergedVocabulary) -> dict[str, bytes]:
    """The files of a tokenizer with exactly these ids, by name; read back and compared.

    Without new tokens they are the origin's own files, byte for byte.

    Raises
    ------
    CheckpointError
        If the origin's kind of tokenizer can't be extended.
    """
    if not merged.new:
        return {path.name: path.read_bytes() for path in tokenizer_files(merged.origin.folder)}
    with tempfile.TemporaryDirectory(prefix="mergepipe-tokenizer-") as name:
        folder = Path(name)
        merged.origin.loaded.save_pretrained(folder)
        if not (folder / "tokenizer.json").is_file():
            raise CheckpointError(
                f"the tokenizer in '{merged.origin.path}' has no form that can be extended (tokenizer.json): use "
                f"`tokenizer_source: base`, or convert it with transformers first"
            )
        document = json.loads((folder / "tokenizer.json").read_bytes())
        _extend(document, merged)
        (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")
        _forget_this_machine(folder / "tokenizer_config.json")
        found = read_tokenizer(name)
        wrong = merged.ids.items() ^ (found.vocab if found else {}).items()
        if wrong:
            token = min(wrong)[0]
            raise CheckpointError(
                f"the tokenizer in '{merged.origin.path}' can't be extended: {token!r} would be "
                f"{found.vocab.get(token) if found else None}, expected {merged.ids.get(token)}. Use "
                f"`tokenizer_source: base`"
            )
        return {path.name: path.read_bytes() for path in tokenizer_files(folder)}


def finds_entries(tokenizer: Tokenizer) -> str | None:
    """How a tokenizer finds new entries of its vocabulary in texts without any rule for them; None if it does not.

    A byte-pair encoding gets nowhere without merge rules, unless it takes whole words first; the new pieces of a
    unigram model score too low to be taken for anything that it can write already.
    """
    model = getattr(getattr(tokenizer.loaded, "backend_tokenizer", None), "model", None)
    kind = type(model).__name__
    if kind == "BPE" and getattr(model, "ignore_merges", False):
        return "takes whole words from its vocabulary before it applies merge rules (ignore_merges)"
    whole = {
        "WordPiece": "takes the longest entries that fit (WordPiece)",
        "WordLevel": "takes whole words (WordLevel)",
    }
    return whole.get(kind)


def _forget_this_machine(path: Path) -> None:
    config = json.loads(path.read_bytes())
    kept = {key: value for key, value in config.items() if key not in (*_OF_THIS_MACHINE, "chat_template")}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _extend(document: dict[str, Any], merged: MergedVocabulary) -> None:
    """Put the new tokens into a `tokenizer.json`.

    Every token is put into the model's own vocabulary as well, added ones included: only then does the library keep
    the ids that are written down. No merge rule leads to a new entry, so that most kinds of tokenizers cut texts as
    before (:func:`finds_entries` tells the others); the tokens that others had added are added here too, and found in
    texts as they stand.
    """
    model = document["model"]
    names = {number: token for token, number in merged.ids.items()}
    if isinstance(model["vocab"], Mapping):
        model["vocab"] = {names[number]: number for number in sorted(names)}
    elif sorted(names) == list(range(len(names))):
        low = min((score for _, score in model["vocab"]), default=0.0) + _NEVER_CHOSEN
        model["vocab"] += [[names[number], low] for number in range(len(model["vocab"]), len(names))]
    else:
        raise CheckpointError(
            f"the tokenizer in '{merged.origin.path}' leaves ids out, so that it can't be extended: use "
            f"`tokenizer_source: base`"
        )
    for token, added in merged.new.items():
        if added is not None:
            flags = {key: getattr(added, key) for key in ("single_word", "lstrip", "rstrip", "normalized", "special")}
            document["added_tokens"].append({"id": merged.ids[token], "content": token, **flags})
    document["added_tokens"].sort(key=lambda entry: entry["id"])


def need_tokenizer(found: Tokenizer | None, path: str) -> Tokenizer:
    """`found`, if there is one.

    Raises
    ------
    CheckpointNotFoundError
    """
    if found is None:
        raise CheckpointNotFoundError(
            f"'{path}' has no tokenizer (tokenizer.json, tokenizer.model or the like): put its files there, or name "
            f"another model as `tokenizer_source`"
        )
    return found
