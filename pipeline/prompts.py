"""Prompts from a file that nobody vouches for: one per line, or JSON lines.

A file whose name ends in ``.jsonl`` or ``.ndjson`` holds one JSON value per line: a string, or an object whose key
``prompt`` is one (other keys are not looked at). Any other file holds one prompt per line, as it stands, spaces
included. Lines that are blank are left out in both. UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergepipe.errors import UsageError

MAX_BYTES = 4 * 1024 * 1024
MAX_PROMPTS = 1000
"""More would take days; and a file of another kind given by mistake is found out early."""

JSON_SUFFIXES = (".jsonl", ".ndjson")


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a file, in its order.

    Parameters
    ----------
    path : path

    Returns
    -------
    tuple of str
        One at least.

    Raises
    ------
    UsageError
        If the file is missing, no regular file, unreadable, larger than :data:`MAX_BYTES`, not UTF-8, binary, without
        a prompt, of more than :data:`MAX_PROMPTS`, or, as JSON lines, not of the form above; names the line.
    """
    source = Path(path)
    text = _read(source)
    as_json = source.suffix.lower() in JSON_SUFFIXES
    # Not splitlines(): a prompt may hold form feeds and the line separators of Unicode.
    lines = enumerate((line.removesuffix("\r") for line in text.split("\n")), 1)
    prompts = tuple(_parse(line, f"{source}:{n}") if as_json else line for n, line in lines if line.strip())
    if not prompts:
        raise UsageError(f'\'{source}\' holds no prompt: write one per line, or JSON lines as {{"prompt": "..."}}')
    if len(prompts) > MAX_PROMPTS:
        raise UsageError(f"'{source}' holds {len(prompts)} prompts; {MAX_PROMPTS} at most are taken: choose some")
    return prompts


def _read(source: Path) -> str:
    try:
        if not source.exists():
            raise UsageError(f"there is no file of prompts '{source}'")
        if not source.is_file():
            raise UsageError(f"'{source}' is no regular file: name a file with one prompt per line")
        with source.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"can't read the prompts '{source}': {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{str(source)!r} is no name of a file: {error}") from error
    if len(raw) > MAX_BYTES:
        raise UsageError(f"'{source}' is larger than {MAX_BYTES} bytes: too large for a file of prompts")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"'{source}' is not UTF-8: byte {error.start}, in line {raw.count(10, 0, error.start) + 1}, is "
            f"0x{raw[error.start]:02x}. Convert it, for example with iconv"
        ) from error
    if "\0" in text:
        raise UsageError(f"'{source}' holds a NUL in line {text.count(chr(10), 0, text.index(chr(0))) + 1}: not text")
    return text


def _parse(line: str, where: str) -> str:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "too deep, or a number too long"
        raise UsageError(f"{where}: not JSON ({reason}); JSON lines hold one value per line") from error
    prompt = value.get("prompt") if isinstance(value, dict) else value
    if not isinstance(prompt, str) or not prompt.strip():
        found = f"an object with {', '.join(map(repr, value)) or 'no key'}" if isinstance(value, dict) else repr(value)
        raise UsageError(f'{where}: found {found[:200]}; expected a string, or {{"prompt": "..."}}, that is not blank')
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(f"{where}: the prompt holds half a surrogate pair, which is no character") from error
    return prompt
