"""`verify` names what is damaged: file, tensor and chunk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import mergepipe
from mergepipe.cli.main import main
from mergepipe.errors import CheckpointNotFoundError, DamageError
from mergepipe.pipeline.verify import _chosen, verify
from mergepipe.storage.header import read_header
from support.jobs import build_job, write_job

from .test_status import interrupt


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    write_job(folder, shards=2)
    mergepipe.run(build_job(folder))
    return folder


def flip(path: Path, at: int) -> None:
    """Flip a bit, and flip it back when called again."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def test_all_is_well(job: Path) -> None:
    for path in (job / "merged", job / "work"):
        for full in (False, True):
            report = verify(path, full=full)
            assert not report.damage
            assert report.nbytes >= sum(file.stat().st_size for file in (job / "merged").glob("*.safetensors"))


def test_names_file_tensor_and_chunk(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = sorted((job / "merged").glob("*.safetensors"))[0]
    header = read_header(shard)
    tensor = header.tensors[-1]
    at = header.data_start + tensor.start + 3
    flip(shard, at)
    try:
        assert main(["verify", str(job / "merged"), "--full"]) == 7
        told = capsys.readouterr().err
        assert shard.name in told
        assert tensor.name in told
        assert "chunk 0" in told
        assert main(["verify", str(job / "work"), "--full", "--json"]) == 7
        found = json.loads(capsys.readouterr().out)
        assert not found["ok"]
        assert found["damage"][0]["chunk"] == 0
    finally:
        flip(shard, at)
    assert main(["verify", str(job / "merged"), "--full"]) == 0


@pytest.mark.parametrize("how", ["gone", "short", "header", "index", "index entry", "manifest"])
def test_other_damage(job: Path, how: str) -> None:
    merged = job / "merged"
    shard = sorted(merged.glob("*.safetensors"))[1]
    index = merged / "model.safetensors.index.json"
    path = {"gone": shard, "short": shard, "header": shard, "manifest": merged / "mergepipe_manifest.json"}.get(
        how, index
    )
    before = path.read_bytes()
    if how in ("gone", "index"):
        path.unlink()
    elif how == "short":
        os.truncate(path, len(before) - 1)
    elif how == "header":
        flip(path, 8)
    elif how == "manifest":
        path.write_bytes(before[:100])
    else:
        values = json.loads(before)
        name = sorted(values["weight_map"])[0]
        values["weight_map"][name] = sorted({*values["weight_map"].values()} - {values["weight_map"][name]})[0]
        path.write_text(json.dumps(values))
    try:
        report = verify(merged)
        assert report.damage
        assert path.name in str(report.damage[0])
        with pytest.raises(DamageError):
            report.raise_for_damage()
    finally:
        path.write_bytes(before)


def test_an_unfinished_workspace(tmp_path: Path) -> None:
    write_job(tmp_path)
    work = build_job(tmp_path)
    assert not verify(work, full=True).damage
    interrupt(work)
    assert not verify(work, full=True).damage
    [part] = (tmp_path / "merged").glob("*.part")
    for at in range(4096, part.stat().st_size, 1000):
        flip(part, at)
    assert "made again" in str(verify(work, full=True).damage[0])
    os.truncate(work / "journal.log", (work / "journal.log").stat().st_size - 1)
    assert any("torn" in str(item) for item in verify(work).damage)
    (tmp_path / "expert-1" / "model.safetensors").unlink()
    assert any("is gone" in str(item) for item in verify(work).damage)


def test_a_copied_store(tmp_path: Path) -> None:
    write_job(tmp_path)
    work = build_job(tmp_path, store="copy")
    assert not verify(work, full=True).damage
    chunks = [path for path in (work / "stores").rglob("c.*") if path.stat().st_size > 64]
    flip(chunks[0], 10)
    damage = verify(work, full=True).damage
    assert [item.file for item in damage] == [str(chunks[0])]
    assert damage[0].tensors
    assert damage[0].chunk is not None


def test_neither(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="neither an output"):
        verify(tmp_path)


def test_a_sample_has_both_ends() -> None:
    assert list(_chosen(3, full=False)) == [0, 1, 2]
    chosen = list(_chosen(1000, full=False))
    assert (chosen[0], chosen[-1], len(chosen)) == (0, 999, 16)
    assert len(list(_chosen(1000, full=True))) == 1000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("[" * 100_000, "no JSON object"),
        ("{}", "which plan"),
        ('{"plan": "1"}', "lists no files"),
        ('{"plan": "1", "shards": {"file": "a"}}', "lists no files"),
        ('{"plan": "1", "shards": ["a"]}', "names no file"),
        ('{"plan": "1", "shards": [{"file": "../../etc/passwd"}]}', "names no file"),
        ('{"plan": "1", "shards": [{"file": "a", "bytes": -1}]}', "no size"),
        ('{"plan": "1", "shards": [{"file": "a", "bytes": 9, "crc32c_bytes": 4, "crc32c": [1, 2]}]}', "one checksum"),
    ],
)
def test_a_manifest_is_proved_before_it_is_believed(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path)
    mergepipe.run(build_job(tmp_path))
    (tmp_path / "merged" / "mergepipe_manifest.json").write_text(text)
    assert main(["verify", str(tmp_path / "merged"), "--full"]) == 7
    assert said in capsys.readouterr().err
    for command in (["verify", str(tmp_path / "work")], ["status", "-w", str(tmp_path / "work")]):
        assert main(command) in (0, 6, 7)
    assert main(["run", "-w", str(tmp_path / "work"), "--quiet"]) != 1


def test_an_index_of_other_folders_is_damage(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = job / "merged" / "model.safetensors.index.json"
    whole = index.read_text(encoding="utf-8")
    try:
        for text in ('{"weight_map": []}', '{"weight_map": {"a": "../b"}}', "7"):
            index.write_text(text)
            assert main(["verify", str(job / "merged")]) == 7
            assert index.name in capsys.readouterr().err
    finally:
        index.write_text(whole)
