"""What a recipe says of tokenizers and chat templates: `tokenizer_source`, `tokenizer`, `chat_template`.

`tokenizer_source: union` is short for ``tokenizer: {source: union}``. A source is ``base``, ``union``, or a model, as
``model:PATH`` or as mergekit writes it, the path alone.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mergepipe.pipeline.chat_templates import BUILTIN, fault_of

Fail = Callable[[str, str], None]
"""Notes a fault: where in the recipe, and what."""

Refer = Callable[[object, str], str | None]
"""The absolute path of a model reference; None, and a fault, if it is none."""

MAX_PADDING = 1 << 20


@dataclass(frozen=True, slots=True)
class TokenSource:
    """Where the row of one token comes from.

    Attributes
    ----------
    kind : {'model', 'model_token', 'zero'}
        The same token of a model, another token of a model, or a row of zeros.
    model : str or None
        Absolute path.
    token, token_id : str or int, one of them
        For 'model_token'.
    force : bool
        Whether models that have the token themselves take this row too.
    """

    kind: Literal["model", "model_token", "zero"]
    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As it stands in a recipe."""
        source: Any = self.model
        if self.kind == "zero":
            source = {"kind": "zero"}
        elif self.kind == "model_token":
            which = {"token": self.token} if self.token_id is None else {"token_id": self.token_id}
            source = {"kind": "model_token", "model": self.model, **which}
        return {"source": source, **({"force": True} if self.force else {})}


@dataclass(frozen=True, slots=True)
class TokenizerSpec:
    """Which vocabulary the merged model has.

    Attributes
    ----------
    source : str
        "base", "union", or "model:" and an absolute path.
    tokens : dict of str to TokenSource
        Tokens whose row is taken from a place of its own; one that no tokenizer has becomes part of the vocabulary.
    pad_to_multiple_of : int or None
        Rows without a token are added up to a multiple of this.
    """

    source: str
    tokens: dict[str, TokenSource] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None

    @property
    def model(self) -> str | None:
        """The model that `source` names, if it does."""
        return self.source.removeprefix("model:") if self.source.startswith("model:") else None

    def to_dict(self) -> dict[str, Any]:
        """The recipe's keys that say this."""
        if not self.tokens and self.pad_to_multiple_of is None:
            return {"tokenizer_source": self.source}
        whole: dict[str, Any] = {"source": self.source}
        if self.tokens:
            whole["tokens"] = {token: source.to_dict() for token, source in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            whole["pad_to_multiple_of"] = self.pad_to_multiple_of
        return {"tokenizer": whole}


def parse_tokenizer(document: Mapping[str, Any], fail: Fail, refer: Refer) -> TokenizerSpec | None:
    """What the two keys of a recipe say; None if they are not there."""
    short, whole = document.get("tokenizer_source"), document.get("tokenizer")
    if whole is None:
        return None if short is None else TokenizerSpec(_source(short, "$.tokenizer_source", fail, refer))
    if short is not None:
        fail("$.tokenizer_source", "says the same as `tokenizer`: leave one of the two out")
    if not isinstance(whole, Mapping):
        fail("$.tokenizer", f"expected a mapping with `source`, found {whole!r}")
        return None
    _known(whole, "$.tokenizer", ("source", "tokens", "pad_to_multiple_of"), fail)
    source = _source(whole.get("source", "union"), "$.tokenizer.source", fail, refer)
    padding = whole.get("pad_to_multiple_of")
    if padding is not None and not (_is_integer(padding) and 1 <= padding <= MAX_PADDING):
        fail("$.tokenizer.pad_to_multiple_of", f"expected a whole number from 1 to {MAX_PADDING}, found {padding!r}")
        padding = None
    return TokenizerSpec(source, _tokens(whole.get("tokens"), fail, refer), padding)


def parse_chat_template(raw: object, fail: Fail) -> str | None:
    """A chat template: "auto", the name of one that is built in, or its text."""
    if raw is None:
        return None
    if not isinstance(raw, str) or not raw.strip():
        fail("$.chat_template", f"expected auto, {', '.join(BUILTIN)} or the text of a Jinja template, found {raw!r}")
        return None
    if raw != "auto" and raw not in BUILTIN:
        if "{{" not in raw and "{%" not in raw:
            close = difflib.get_close_matches(raw, ["auto", *BUILTIN], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there is auto, {', '.join(BUILTIN)}"
            fail("$.chat_template", f"{raw!r} is neither a template that is built in nor the text of one; {hint}")
        elif (fault := fault_of(raw)) is not None:
            fail("$.chat_template", fault)
    return raw


def _source(raw: object, path: str, fail: Fail, refer: Refer) -> str:
    if raw in ("base", "union"):
        return str(raw)
    if isinstance(raw, str):
        raw = raw.removeprefix("model:")
    elif not isinstance(raw, Mapping):
        fail(path, f"expected base, union, model:<path> or the path of a model, found {raw!r}")
        return "base"
    return f"model:{refer(raw, path)}"


def _tokens(raw: object, fail: Fail, refer: Refer) -> dict[str, TokenSource]:
    if raw is not None and not isinstance(raw, Mapping):
        fail("$.tokenizer.tokens", f"expected a mapping from token to {{source: …}}, found {raw!r}")
    found = {}
    for token, entry in raw.items() if isinstance(raw, Mapping) else ():
        path = f"$.tokenizer.tokens[{token!r}]"
        if not isinstance(token, str) or not token:
            fail(path, "expected the text of a token as the key: put it into quotes")
            continue
        source = _token_source(entry, path, fail, refer)
        if source is not None:
            found[token] = source
    return found


def _token_source(entry: object, path: str, fail: Fail, refer: Refer) -> TokenSource | None:
    if not isinstance(entry, Mapping) or entry.get("source") is None:
        fail(path, f"expected {{source: MODEL, or a mapping with `kind`, force: true or false}}, found {entry!r}")
        return None
    _known(entry, path, ("source", "force"), fail)
    force, source = entry.get("force", False), entry["source"]
    if not isinstance(force, bool):
        fail(f"{path}.force", f"expected true or false, found {force!r}")
        force = False
    if not isinstance(source, Mapping) or "kind" not in source:
        model = refer(source, f"{path}.source")
        return None if model is None else TokenSource("model", model, force=force)
    if source["kind"] == "zero":
        _known(source, f"{path}.source", ("kind",), fail)
        return TokenSource("zero", force=force)
    if source["kind"] == "model_token":
        return _model_token(source, f"{path}.source", fail, refer, force=force)
    fail(f"{path}.source.kind", f"expected model_token or zero, found {source['kind']!r}")
    return None


def _model_token(source: Mapping[Any, Any], path: str, fail: Fail, refer: Refer, *, force: bool) -> TokenSource | None:
    _known(source, path, ("kind", "model", "token", "token_id"), fail)
    token, number = source.get("token"), source.get("token_id")
    model = refer(source.get("model"), f"{path}.model")
    if (token is None) == (number is None):
        fail(path, "expected one of `token`, its text, and `token_id`, its number in that model")
    elif number is not None and not (_is_integer(number) and 0 <= number < 1 << 31):
        fail(f"{path}.token_id", f"expected the number of a token, found {number!r}")
    elif token is not None and not isinstance(token, str):
        fail(f"{path}.token", f"expected the text of a token, found {token!r}")
    elif model is not None:
        return TokenSource("model_token", model, token, number, force)
    return None


def _known(mapping: Mapping[Any, Any], path: str, keys: tuple[str, ...], fail: Fail) -> None:
    for key in mapping:
        if key not in keys:
            close = difflib.get_close_matches(str(key), keys, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there is {', '.join(keys)}"
            fail(f"{path}.{key}", f"is no key that belongs here; {hint}")


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
