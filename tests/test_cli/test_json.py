"""Every key that `--json` prints, and every field of the event log, stands in docs/json.md."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergepipe.cli.main import main
from support.jobs import hashes, write_job

PAGE = (Path(__file__).parents[2] / "docs" / "json.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0].strip(): part for part in re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]}
OPEN = {"recipe", "densities", "versions", "tensors", "side", "merges"}
"""Their keys are names of tensors, models and the like."""


def keys(value: Any, section: str) -> Iterator[str]:
    """All keys, however deep; of a dict by name, method or data type only those of its values."""
    if isinstance(value, list):
        for item in value:
            yield from keys(item, section)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key == "dtypes" or (key == "methods" and isinstance(inner, dict)):
                yield from keys(list(inner.values()), section)
            elif key not in OPEN or isinstance(inner, list):
                yield from keys(inner, section)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_job(tmp_path, shards=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    assert main([*args, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    section = SECTIONS[args[0]] + (SECTIONS["build"] if args[0] == "plan" else "")
    missing = {key for key in keys(found, args[0]) if f"`{key}`" not in section}
    assert not missing, f"docs/json.md, section {args[0]}, says nothing of {sorted(missing)}"
    return found


def test_every_key_is_documented(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed(capsys, "build", "recipe.yaml")
    printed(capsys, "plan")
    assert printed(capsys, "status")["state"] == "built"
    result = printed(capsys, "run", "--quiet")
    assert result["manifest"] == json.loads(
        Path(result["output"], "mergepipe_manifest.json").read_text(encoding="utf-8")
    )
    printed(capsys, "status")
    assert printed(capsys, "verify")["ok"]
    shard = next(name for name in hashes(job / "merged") if name.endswith(".safetensors"))
    data = bytearray((job / "merged" / shard).read_bytes())
    data[-1] ^= 1
    (job / "merged" / shard).write_bytes(data)
    assert printed(capsys, "verify", "--full", code=7)["damage"]
    printed(capsys, "inspect", "base", "expert-1", "--stats")
    assert "ties" in {method["name"] for method in printed(capsys, "methods")["methods"]}
    printed(capsys, "methods", "scf_rkl")
    assert main(["run", "--quiet"]) == 0
    for line in map(json.loads, (job / ".mergepipe" / "events.jsonl").read_text(encoding="utf-8").splitlines()):
        missing = {f"`{name}`" for name in (*line, line["event"])} - set(
            re.findall(r"`\w+`", SECTIONS["The event log"])
        )
        assert not missing
