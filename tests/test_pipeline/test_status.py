"""What `status` and `clean` say of a job in each of its states."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mergepipe
from mergepipe.cli.main import main
from mergepipe.errors import Interrupted, WorkspaceError
from mergepipe.pipeline.clean import clean, scratch
from mergepipe.pipeline.events import Event, UnitFinished
from mergepipe.pipeline.status import _rate, status
from mergepipe.storage.workspace import Workspace, WorkspaceLock
from support.jobs import build_job, hashes, write_job


class StopAfter:
    """Asks for the end of a run after some units; it is its own stop event."""

    def __init__(self, units: int) -> None:
        self.units = units

    def __call__(self, event: Event) -> None:
        self.units -= isinstance(event, UnitFinished) and event.stage == "apply"

    def is_set(self) -> bool:
        return self.units <= 0

    def set(self) -> None:
        self.units = 0


@pytest.fixture
def work(tmp_path: Path) -> Path:
    write_job(tmp_path, shards=2)
    return build_job(tmp_path)


def interrupt(work: Path, units: int = 3) -> None:
    """Stop a run as soon as so many units are written, with none on its way."""
    stop = StopAfter(units)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mergepipe.pipeline.shards.UNITS_BEHIND", 0)
        with pytest.raises(Interrupted, match="mergepipe run --work"):
            mergepipe.run(work, workers=1, stop=stop, on_event=stop)  # type: ignore[arg-type]


def test_the_life_of_a_job(work: Path, tmp_path: Path) -> None:
    found = status(work)
    assert (found.state, found.done_bytes, found.percent) == ("built", 0, 0.0)
    interrupt(work)
    found = status(work)
    assert found.state == "interrupted"
    assert 0 < found.done_bytes < found.total_bytes
    assert f"mergepipe run --work {work}" in found.remedy
    assert (found.worked_bytes, found.work_bytes) == (None, None)
    with WorkspaceLock(Workspace(work)), open(work / "events.jsonl", "a", encoding="utf-8") as log:
        log.write('{"at": 1.0, "event": "Progress", "done_bytes": 3, "total_bytes": 9}\n{"event": "TensorFinished"}\n')
        log.flush()
        running = status(work)
        assert running.state == "running"
        assert running.process is not None
        assert (running.worked_bytes, running.work_bytes) == (3, 9)
    mergepipe.run(work)
    found = status(work)
    assert (found.state, found.percent, found.shards_done) == ("done", 100.0, 2)
    [shard, _] = sorted((tmp_path / "merged").glob("*.safetensors"))
    shard.unlink()
    found = status(work)
    assert found.state == "damaged"
    assert shard.name in found.damage[0]


def test_on_the_command_line(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "-w", str(work)]) == 0
    assert "state     built" in capsys.readouterr().out
    interrupt(work)
    assert main(["status", "-w", str(work), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["state"] == "interrupted"
    assert found["percent"] == round(100 * found["done_bytes"] / found["total_bytes"], 2)


def test_the_rate_is_that_of_the_latest_process() -> None:
    units = [{"type": "units", "at": at, "units": [[0, 0, 100, 0]]} for at in (1.0, 12.0, 14.0)]
    records = [{"type": "begin", "at": 0.0}, units[0], {"type": "begin", "at": 10.0}, *units[1:]]
    assert _rate(records, None) == 200 / 4
    assert _rate(records, 20.0) == 200 / 10
    assert _rate(records[:1], 20.0) is None


def test_clean_removes_scratch_only(work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = {name: hashes(tmp_path / name) for name in ("base", "expert-1", "expert-2")}
    interrupt(work)
    assert scratch(work).nbytes > 0
    with WorkspaceLock(Workspace(work)), pytest.raises(WorkspaceError, match="in use"):
        clean(work)
    assert main(["clean", "-w", str(work), "--yes"]) == 0
    assert not work.exists()
    assert not (tmp_path / "merged").exists(), "an unfinished output is scratch"
    build_job(tmp_path)
    mergepipe.run(work)
    whole = hashes(tmp_path / "merged")
    clean(work)
    assert not work.exists()
    assert hashes(tmp_path / "merged") == whole
    assert {name: hashes(tmp_path / name) for name in inputs} == inputs
    assert main(["clean", "-w", str(tmp_path), "--yes"]) == 6
    capsys.readouterr()


def test_clean_asks(work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("click.confirm", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["clean", "-w", str(work)]) == 130
    assert work.exists()


def test_foreign_files_stay(work: Path) -> None:
    (work / "mine.txt").write_text("keep")
    clean(work)
    assert [path.name for path in work.iterdir()] == ["mine.txt"]
