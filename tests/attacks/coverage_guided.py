"""One parser under atheris, which follows coverage: ``python coverage_guided.py PARSER [libFuzzer options]``.

Only the documented errors may come out. Anything else, a hang of more than 20 s or more than 1 GiB of memory included,
ends the process with a report.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["mergepipe"]):
    from mergepipe.errors import CheckpointError, RecipeError, WorkspaceError
    from mergepipe.pipeline.recipe import parse_recipe
    from mergepipe.storage.checkpoint import open_checkpoint
    from mergepipe.storage.header import parse_header
    from mergepipe.storage.journal import MAGIC, parse


def header(data: bytes) -> None:
    """A header's JSON, with a file size taken from the first two bytes."""
    parse_header(data[2:], int.from_bytes(data[:2], "little"), "fuzz")


def index(data: bytes) -> None:
    """An index in a folder that holds nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.safetensors.index.json").write_bytes(data)
        open_checkpoint(Path(folder))


def recipe(data: bytes) -> None:
    """A recipe's text."""
    parse_recipe(data.decode("utf-8", "replace"), "fuzz")


def journal(data: bytes) -> None:
    """What follows the magic of a journal; the part believed is never longer than the file."""
    records, end = parse(MAGIC + data)
    assert len(MAGIC) <= end <= len(MAGIC) + len(data)
    assert all(isinstance(record, dict) for record in records)


PARSERS: dict[str, Callable[[bytes], None]] = {"header": header, "index": index, "recipe": recipe, "journal": journal}


def main() -> None:
    """Fuzz the parser that the command line names."""
    target = PARSERS[sys.argv.pop(1)]

    def once(data: bytes) -> None:
        try:
            target(data)
        except (CheckpointError, RecipeError, WorkspaceError):
            return

    atheris.Setup(sys.argv, once)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
