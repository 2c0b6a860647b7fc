"""Who may be in a workspace, and what is in it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mergepipe.errors import WorkspaceError
from mergepipe.storage.journal import Journal
from mergepipe.storage.workspace import Workspace, WorkspaceLock

HOLD = "\n".join(
    [
        "import sys, time",
        "from pathlib import Path",
        "from mergepipe.storage.workspace import Workspace, WorkspaceLock",
        "with WorkspaceLock(Workspace(Path(sys.argv[1]))):",
        "    print('held', flush=True)",
        "    time.sleep(60)",
    ]
)


def test_refuses_what_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(WorkspaceError, match="not empty and no workspace"):
        Workspace(tmp_path).create()
    with pytest.raises(WorkspaceError, match="is a file"):
        Workspace(tmp_path / "thesis.txt").create()
    Workspace(tmp_path / "w").create()
    Workspace(tmp_path / "w").create()
    with pytest.raises(WorkspaceError, match="run `mergepipe build` first"):
        Workspace(tmp_path / "w").read_plan()


def test_a_dead_process_holds_nothing(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.holder() is None
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        assert workspace.holder() == holder.pid
        started = time.monotonic()
        with pytest.raises(WorkspaceError, match=f"in use by process {holder.pid}"), WorkspaceLock(workspace):
            pass
        assert time.monotonic() - started < 1
        holder.kill()
    assert workspace.holder() is None
    with WorkspaceLock(workspace):
        assert workspace.holder() is not None
    assert workspace.holder() is None


def test_a_lock_file_that_is_removed_lets_nobody_in(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    with holder:
        assert holder.stdout.readline() == "held\n"
        workspace.lock_file.unlink()
        with pytest.raises(WorkspaceError, match="in use"), WorkspaceLock(workspace):
            pass
        holder.kill()
    with WorkspaceLock(workspace):
        assert workspace.lock_file.exists()


def test_begun(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert not workspace.begun()
    journal = Journal(workspace.journal_file)
    assert not workspace.begun(), "a run that was refused has written nothing"
    journal.append([{"type": "plan"}])
    journal.close()
    assert workspace.begun()
    workspace.forget_progress()
    assert not workspace.begun()


def test_names_of_stores_are_safe(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.store(3, "a/../b c").name == "3-a-..-b-c"
    kept, gone = workspace.store(0, "kept"), workspace.store(1, "gone")
    for folder in (kept, gone):
        folder.mkdir(parents=True)
    workspace.forget_stores({kept})
    assert kept.exists()
    assert not gone.exists()
