"""Merged tokenizers: the files that are written load again, with these ids, and cut texts as before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import AddedToken, models, pre_tokenizers

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.tokenizers import (
    Tokenizer,
    finds_entries,
    merged_vocabulary,
    read_tokenizer,
    tokenizer_files,
    written_files,
)
from support.vocabularies import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("default")

WORDS = ["[UNK]", "hello", "world", "merge", "##d", "##s"]


def of_kind(kind: str, more: list[str], added: list[AddedToken]) -> Any:
    """A tokenizer of each of the library's models, with some words more and some added tokens."""
    words = [*WORDS, *more]
    vocab = {word: number for number, word in enumerate(words)}
    made: Any = {
        "WordPiece": lambda: models.WordPiece(vocab, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(vocab, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram([(word, -float(n)) for n, word in enumerate(words)], unk_id=0),
    }[kind]()
    tokenizer = tokenizers.Tokenizer(made)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(added)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def saved(tokenizer: Any, folder: Path) -> Tokenizer:
    tokenizer.save_pretrained(folder)
    found = read_tokenizer(str(folder))
    assert found is not None
    return found


def reloaded(files: dict[str, bytes], folder: Path) -> Any:
    """What transformers makes of the files."""
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["WordPiece", "WordLevel", "Unigram"])
def test_every_kind_of_tokenizer_can_be_extended(tmp_path: Path, kind: str) -> None:
    one = saved(of_kind(kind, ["alpha"], [AddedToken("<a>", special=True)]), tmp_path / "one")
    two = saved(of_kind(kind, ["beta", "gamma"], [AddedToken("<b>", lstrip=True), AddedToken("<a>")]), tmp_path / "two")
    merged = merged_vocabulary(one, [one, two], ["<new>"])
    assert list(merged.new) == ["beta", "gamma", "<b>", "<new>"]
    assert [merged.ids[token] for token in merged.new] == list(range(one.rows, one.rows + 4))
    again = reloaded(written_files(merged), tmp_path / "merged")
    assert again.get_vocab() == merged.ids
    for text in ("hello world alpha", "hello <a>world", "merge hello"):
        assert again(text).input_ids == one.loaded(text).input_ids
    assert merged.ids["<b>"] in again("hello <b> world").input_ids
    assert merged.ids["<new>"] in again("hello<new>").input_ids
    entry = again.added_tokens_decoder[merged.ids["<b>"]]
    assert (entry.content, entry.lstrip, entry.special) == ("<b>", True, False)
    assert again.added_tokens_decoder[merged.ids["<a>"]].special


def test_a_byte_level_text_is_cut_as_before(tmp_path: Path) -> None:
    """Pieces of another tokenizer get ids and stand for their bytes, but no text of the base's is cut differently."""
    one = saved(byte_tokenizer(["ab"]), tmp_path / "one")
    two = saved(byte_tokenizer(["ab", "cd", "Ġa", "abcd"], {"<tool>": False}), tmp_path / "two")
    merged = merged_vocabulary(one, [one, two])
    again = reloaded(written_files(merged), tmp_path / "merged")
    for text in ("abcd ab cd", " a bcd", "abcd abcd"):
        assert again(text).input_ids == one.loaded(text).input_ids
    assert again.decode([merged.ids["Ġa"], merged.ids["cd"]]) == " acd"
    assert again("ab<tool>cd").input_ids.count(merged.ids["<tool>"]) == 1
    assert again.tokenize("<tool>") == ["<tool>"]


LETTERS = "abcdefgh"


def cutting(kind: str, more: list[str]) -> Any:
    """A tokenizer that can write any word of a few letters (a unigram model all but `h`), with some pieces more."""
    ends = [f"##{c}" for c in LETTERS]
    vocab = {token: number for number, token in enumerate(["[UNK]", *LETTERS, "Ġ", *ends, *more])}
    pairs = [("c", "d"), ("cd", "e"), ("Ġ", "cde")]
    merges = [pair for pair in pairs if all(piece in vocab for piece in (*pair, "".join(pair)))]
    scored = [("[UNK]", 0.0), *((c, -3.0) for c in LETTERS[:-1]), *((token, -1.0) for token in more)]
    model: Any = {
        "BPE": lambda: models.BPE(vocab, merges),
        "ignore_merges": lambda: models.BPE(vocab, merges, ignore_merges=True),
        "WordPiece": lambda: models.WordPiece(vocab, unk_token="[UNK]"),
        "WordLevel": lambda: models.WordLevel(vocab, unk_token="[UNK]"),
        "Unigram": lambda: models.Unigram(scored, unk_id=0),
    }[kind]()
    tokenizer = tokenizers.Tokenizer(model)
    byte_level = kind in ("BPE", "ignore_merges")
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False) if byte_level else pre_tokenizers.WhitespaceSplit()
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize(
    ("kind", "text", "before", "after"),
    [
        ("BPE", "cde cdea", "c d e Ġ c d e a", None),
        ("ignore_merges", "cde cdea cde", "c d e Ġ c d e a Ġ c d e", "cde Ġ c d e a Ġcde"),
        ("WordPiece", "cde cdea acd", "c ##d ##e c ##d ##e ##a a ##c ##d", "cde cde ##a a ##cd"),
        ("WordLevel", "cde a cd", "[UNK] a [UNK]", "cde a cd"),
        ("Unigram", "cde cdh", "c d e c d h", None),
    ],
)
def test_which_tokenizers_cut_texts_into_the_entries_of_others(
    kind: str, text: str, before: str, after: str | None, tmp_path: Path
) -> None:
    """As the table in docs/tokenizers.md says."""
    one = saved(cutting(kind, []), tmp_path / "one")
    two = saved(cutting(kind, ["cd", "cde", "##cd", "Ġcde", "h"]), tmp_path / "two")
    merged = merged_vocabulary(one, [one, two])
    assert set(merged.new) >= {"cd", "cde", "##cd", "Ġcde"}
    assert set(merged.new.values()) == {None}
    again = reloaded(written_files(merged), tmp_path / "merged")
    assert one.loaded.tokenize(text) == before.split()
    assert again.tokenize(text) == (after or before).split()
    assert (finds_entries(one) is not None) == (after is not None)
    if kind == "Unigram":
        assert again("h").input_ids == [merged.ids["h"]] != one.loaded("h").input_ids


def test_special_tokens_and_settings_are_the_origins(tmp_path: Path) -> None:
    byte_tokenizer(["ab"]).save_pretrained(tmp_path / "one")
    path = tmp_path / "one" / "tokenizer_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"padding_side": "left", "model_max_length": 77})
    )
    one = read_tokenizer(str(tmp_path / "one"))
    assert one is not None
    two = saved(byte_tokenizer(["ab"], {"<x>": True}), tmp_path / "two")
    files = written_files(merged_vocabulary(one, [one, two]))
    again = reloaded(files, tmp_path / "merged")
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")
    assert (again.padding_side, again.model_max_length) == ("left", 77)
    assert str(tmp_path).encode() not in b"".join(files.values())


def test_without_new_tokens_the_files_are_the_origins(tmp_path: Path) -> None:
    one = saved(byte_tokenizer(["ab"]), tmp_path / "one")
    assert written_files(merged_vocabulary(one, [one])) == {
        path.name: path.read_bytes() for path in tokenizer_files(tmp_path / "one")
    }


def test_the_same_tokenizers_make_the_same_files(tmp_path: Path) -> None:
    one = saved(byte_tokenizer(["ab"]), tmp_path / "one")
    others = [saved(byte_tokenizer(["ab", f"c{n}"], {f"<{n}>": True}), tmp_path / n) for n in "abd"]
    assert written_files(merged_vocabulary(one, others)) == written_files(merged_vocabulary(one, others))


def test_a_unigram_with_gaps_is_refused(tmp_path: Path) -> None:
    one = saved(of_kind("Unigram", [], []), tmp_path / "one")
    merged = merged_vocabulary(one, [one], ["<new>"])
    merged.ids["<new>"] += 2
    with pytest.raises(CheckpointError, match="leaves ids out"):
        written_files(merged)


def test_a_model_that_transformers_does_not_know(tmp_path: Path) -> None:
    byte_tokenizer(["ab"]).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "of-next-year", "vocab_size": 3}')
    found = read_tokenizer(str(tmp_path))
    assert found is not None
    assert found.vocab["ab"] == 20


def test_a_folder_without_one(tmp_path: Path) -> None:
    assert read_tokenizer(str(tmp_path)) is None
