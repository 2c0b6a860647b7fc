"""The two listeners, with a clock of the test's own."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from mergepipe.cli.bars import Bars
from mergepipe.cli.main import main
from mergepipe.cli.progress import BarProgress, PlainProgress, progress
from mergepipe.pipeline.eventlog import EventLog
from mergepipe.pipeline.events import (
    Announcer,
    CopyProgress,
    Event,
    Note,
    RunFinished,
    RunStarted,
    ShardSealed,
    TensorFinished,
    UnitFinished,
)

STORY = [
    CopyProgress("base", 512, 1024),
    CopyProgress("base", 512, 1024),
    Note("an earlier run of this plan did not finish"),
    RunStarted(total_bytes=4096, tensors=2, done_bytes=1024, allowed_bytes=512 * 1024**2),
    UnitFinished("a", "coarse histogram", 1024),
    UnitFinished("a", "apply", 1024),
    TensorFinished("a"),
    UnitFinished("b", "apply", 1024),
    ShardSealed("model.safetensors", 2048),
    RunFinished("merged", 1.0),
]


def test_plain_lines_come_every_few_seconds() -> None:
    out = io.StringIO()
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 2.0
        return now

    show = PlainProgress(out, every_s=4.0, clock=clock)
    for event in STORY:
        show(event)
    assert out.getvalue().splitlines() == [
        "copying base 100 %, 1.0 KiB of 1.0 KiB, 256 bytes/s, 0.0 s left",
        "note: an earlier run of this plan did not finish",
        "merging 2 tensors, 4.0 KiB to read and write",
        "merging  75 %, 3.0 KiB of 4.0 KiB, 512 bytes/s, 2.0 s left",
        "model.safetensors is complete, 2.0 KiB",
    ]


def test_lines_get_rarer_in_a_long_job() -> None:
    out = io.StringIO()
    now = 0.0
    show = PlainProgress(out, clock=lambda: now)
    show(RunStarted(total_bytes=100_000, tensors=1))
    for second in range(3600):
        now = float(second)
        show(UnitFinished("a", "apply", 10))
    lines = out.getvalue().splitlines()
    assert 60 < len(lines) < 120


def test_bars_move() -> None:
    out = io.StringIO()
    asked = False
    with Bars(Console(file=out, width=80, force_terminal=True), stopping=lambda: asked) as bars:
        show = BarProgress(bars, bars.tell)
        for event in STORY:
            show(event)
        bars.refresh()
        last = out.getvalue().splitlines()[-1]
        assert re.search(r"memory [\d,.]+ [MG]iB of 512\.0 MiB, a \(coarse histogram\)", last), last
        asked = True
        bars.refresh()
        assert "stopping: the work under way" in out.getvalue().splitlines()[-1]
        assert [(task.description, task.completed, task.total) for task in bars.tasks] == [
            ("copying base", 1024, 1024),
            ("merging", 4096, 4096),
        ]
    assert "note: an earlier run" in out.getvalue()
    assert "model.safetensors is complete" in out.getvalue()


def test_what_the_terminal_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    with progress(quiet=True) as listener:
        assert listener is None
    with progress() as listener:
        assert isinstance(listener, PlainProgress)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress() as listener:
        assert isinstance(listener, BarProgress)


@pytest.mark.parametrize("stdout_too", [False, True], ids=["stderr", "both"])
def test_a_run_that_nobody_watches_any_more_goes_on(models: Path, stdout_too: bool) -> None:
    """`mergepipe run 2>&1 >/dev/null | head` ends the listening, not the merge."""
    assert main(["build"]) == 0
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        out = closed if stdout_too else subprocess.DEVNULL
        result = subprocess.run([sys.executable, "-m", "mergepipe", "run"], stdout=out, stderr=closed)
    assert result.returncode == 0
    assert (models / "merged" / "model.safetensors").exists()
    assert main(["verify", "--full", "merged"]) == 0


def test_a_run_without_stdout_and_stderr(models: Path) -> None:
    assert main(["build"]) == 0
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable]
    assert subprocess.run([*closed, "-m", "mergepipe", "run"]).returncode == 0
    assert main(["verify", "--full", "merged"]) == 0
    code = (
        "from mergepipe.cli.main import open_standard_streams; open_standard_streams(); "
        "import os; file = open('shard', 'w'); os.write(2, b'what a library warns of'); file.close()"
    )
    assert subprocess.run([*closed, "-c", code]).returncode == 0
    assert (models / "shard").read_bytes() == b""


def test_a_failing_run_keeps_its_exit_code_when_nobody_reads_why(models: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        result = subprocess.run([sys.executable, "-m", "mergepipe", "run"], stdout=closed, stderr=closed)
    assert result.returncode == 6, "there is no plan"


def test_a_pipe_that_breaks_in_the_work_is_no_success(
    models: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["build"]) == 0

    def broken(*_: object, **__: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("mergepipe.pipeline.run.run", broken)
    assert main(["run"]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_a_listener_that_fails_is_told_no_more_and_the_log_goes_on(tmp_path: Path) -> None:
    told: list[Event] = []

    def listener(event: Event) -> None:
        told.append(event)
        raise BrokenPipeError

    with EventLog(tmp_path / "events.jsonl", also=listener) as log:
        announce = Announcer(log)
        for text in ("one", "two"):
            announce(Note(text))
    assert told == [Note("one")]
    assert [
        json.loads(line)["text"] for line in (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ] == ["one", "two"]
