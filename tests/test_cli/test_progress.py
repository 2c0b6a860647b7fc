"""The two listeners, with a clock of the test's own."""

from __future__ import annotations

import io
import re
import sys

import pytest
from rich.console import Console

from mergepipe.cli.bars import Bars
from mergepipe.cli.progress import BarProgress, PlainProgress, progress
from mergepipe.pipeline.events import (
    CopyProgress,
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
        assert re.search(r"memory [\d.]+ MiB of 512\.0 MiB, a \(coarse histogram\)", last), last
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
