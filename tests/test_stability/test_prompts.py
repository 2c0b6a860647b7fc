"""Files of prompts: the two formats, and everything else that a file may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mergepipe.errors import UsageError
from mergepipe.pipeline import prompts
from mergepipe.pipeline.prompts import read_prompts


def written(folder: Path, content: bytes, name: str = "prompts.txt") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def test_one_prompt_per_line(tmp_path: Path) -> None:
    content = "\ufeffOnce upon\r\n\r\n   \n  spaces stay \nform\x0cfeed and\u2028separator\nGrüße".encode()
    expected = ("Once upon", "  spaces stay ", "form\x0cfeed and\u2028separator", "Grüße")
    assert read_prompts(written(tmp_path, content)) == expected


def test_json_lines(tmp_path: Path) -> None:
    content = b'"two\\nlines"\n\n{"prompt": "Sum:", "id": 7}\r\n'
    for name in ("a.jsonl", "b.NDJSON"):
        assert read_prompts(written(tmp_path, content, name)) == ("two\nlines", "Sum:")
    assert read_prompts(written(tmp_path, b'{"prompt": "x"}')) == ('{"prompt": "x"}',), "by the name alone"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "no prompt"),
        (b"\n \r\n\t\n", "no prompt"),
        (b"ok\nna\xefve", "not UTF-8: byte 5, in line 2, is 0xef"),
        (b"ok\nPK\0\0", "NUL in line 2"),
        (b"x\n" * 1001, "1001 prompts"),
        (b"x" * (prompts.MAX_BYTES + 1), "larger than"),
    ],
)
def test_files_that_are_no_prompts(tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_prompts(written(tmp_path, content))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "not JSON"),
        (b"[" * 100_000, "too deep"),
        (b"9" * 5000, "too long"),
        (b"7", "found 7"),
        (b'{"text": "x"}', "an object with 'text'"),
        (b"{}", "an object with no key"),
        (b'{"prompt": ["x"]}', "expected a string"),
        (b'" "', "not blank"),
        (b'"\\ud800"', "surrogate"),
        (b"NaN", "found nan"),
    ],
)
def test_json_lines_that_are_no_prompts(tmp_path: Path, line: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        read_prompts(written(tmp_path, b'"fine"\n' + line, "prompts.jsonl"))
    assert "prompts.jsonl:2" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_files_that_are_no_files(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, said in ((tmp_path / "none", "no file"), (tmp_path, "no regular file"), (fifo, "no regular file"),
                       (tmp_path / ("n" * 300), "can't read|no file"), ("a\0b", "no name")):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            read_prompts(path)
