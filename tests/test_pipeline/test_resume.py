"""Going on with earlier work: what is believed, what is done again, and when going on is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mergepipe
from mergepipe.cli.main import main
from mergepipe.errors import (
    DiskFullError,
    HandOverError,
    Interrupted,
    InTheWayError,
    OutputExistsError,
    UsageError,
    WorkspaceError,
)
from mergepipe.pipeline import recheck
from mergepipe.pipeline.events import Event, Note, TensorFinished, UnitFinished
from mergepipe.pipeline.plan import PlannedTensor, Source
from mergepipe.pipeline.resume import Progress, Written, decode_state, encode_state, gaps, merged, remaining
from mergepipe.pipeline.schedule import ScheduledTensor
from mergepipe.pipeline.shards import Shards
from mergepipe.pipeline.verify import verify
from mergepipe.storage.journal import read_journal
from mergepipe.storage.writer import SealedShard, ShardWriter
from mergepipe.tasks.blocks import block_bounds, block_count
from support.jobs import LARGER, build_job, hashes, write_job

from .test_status import StopAfter, interrupt


@pytest.fixture
def job(tmp_path: Path) -> Path:
    write_job(tmp_path, shards=2)
    build_job(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("expected")
    write_job(folder, shards=2)
    mergepipe.run(build_job(folder))
    return hashes(folder / "merged")


class Watch:
    """Remembers what a run says."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.stages: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            self.notes.append(event.text)
        elif isinstance(event, UnitFinished):
            self.stages.append(event.stage)


# ── facts and units, without a byte of a file ──


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 10)), max_size=12), st.integers(0, 60))
def test_intervals_and_gaps_cover_everything_once(pieces: list[tuple[int, int]], length: int) -> None:
    written = [Written(start, start + count, 0) for start, count in pieces]
    done = merged(written)
    covered = {i for start, stop in done for i in range(start, stop)}
    assert covered == {i for item in written for i in range(item.start, item.stop)}
    assert all(a[1] < b[0] for a, b in pairwise(done))
    missing = [i for start, stop in gaps(length, done) for i in range(start, stop)]
    assert sorted(missing) == sorted(set(range(length)) - covered)


@given(st.tuples(st.integers(1, 300), st.integers(1, 3000)), st.data())
def test_the_rest_is_what_was_not_done_whatever_the_cut_was(shape: tuple[int, int], data: st.DataObject) -> None:
    source = Source(0, "w", "BF16")
    tensor = PlannedTensor("w", shape, "BF16", "merge", source, (source,), method="linear")
    blocks = block_count(shape)
    before, now = data.draw(st.integers(1, blocks)), data.draw(st.integers(1, blocks))
    cut = [(first, min(first + before, blocks)) for first in range(0, blocks, before)]
    kept = data.draw(st.lists(st.sampled_from(cut), unique=True))
    written = [
        Written(2 * block_bounds(shape, first)[0], 2 * block_bounds(shape, last - 1)[1], 0) for first, last in kept
    ]
    units = tuple((first, min(first + now, blocks)) for first in range(0, blocks, now))
    rest = remaining(ScheduledTensor(tensor, units, (), 0), written)
    left = [block for first, last in rest.units for block in range(first, last)]
    assert left == sorted(set(range(blocks)) - {block for first, last in kept for block in range(first, last)})
    assert all(last - first <= now for first, last in rest.units)


def test_a_state_comes_back_bit_for_bit() -> None:
    state = {
        "thresholds": np.array([[np.nan, -0.0], [1e-45, np.inf]], np.float32),
        "counts": np.array([2**62], np.int64),
        "scalar": np.float64(0.1) * np.ones(()),
        "histogram": np.zeros(5, np.int64),
    }
    found = decode_state(json.loads(json.dumps(encode_state(state))))
    assert sorted(found) == ["counts", "scalar", "thresholds"], "a histogram is kept as a statistic only"
    for name, value in found.items():
        assert value.tobytes() == state[name].tobytes()
        assert (value.dtype, value.shape) == (state[name].dtype, state[name].shape)


def test_forgotten_work_is_not_done() -> None:
    sealed = {"type": "sealed", "shard": 0, "file": "m", "size": 9, "crc32c": [1], "sha256": None}
    records: list[dict[str, Any]] = [
        {"type": "plan", "plan": "p", "version": "1"},
        {"type": "units", "units": [[0, 0, 8, 5], [1, 0, 8, 6]]},
        sealed,
        {"type": "handed", "shard": 0},
        {"type": "forget", "tensors": [0], "shards": [0]},
        {"type": "from the future"},
    ]
    progress = Progress.replay(records)
    assert (progress.written, progress.sealed, progress.handed) == ({1: [Written(0, 8, 6)]}, {}, set())


# ── whole runs ──


@pytest.mark.parametrize("units", [1, 2, 4, 6])
def test_goes_on_where_it_was(job: Path, expected: dict[str, str], units: int) -> None:
    interrupt(job / "work", units)
    watch = Watch()
    mergepipe.run(job / "work", on_event=watch)
    assert any("going on with an earlier run" in note for note in watch.notes)
    assert hashes(job / "merged") == expected
    again = Watch()
    mergepipe.run(job / "work", on_event=again)
    assert again.stages == []
    assert "nothing to do" in again.notes[0]


def test_what_fails_after_the_signal_is_told(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A unit that was made before the run was asked to stop, and could not be written after: that is what ended it."""
    stop = threading.Event()

    def write(self: ShardWriter, offset: int, data: Any) -> int:
        assert stop.wait(10)
        raise DiskFullError("no room for it")

    def end(event: Event) -> None:
        if isinstance(event, UnitFinished) and event.stage != "apply":
            threading.Timer(0.3, stop.set).start()

    monkeypatch.setattr(ShardWriter, "write", write)
    with pytest.raises(DiskFullError, match="no room for it"):
        mergepipe.run(job / "work", stop=stop, on_event=end)


def test_reductions_are_not_made_again(tmp_path: Path) -> None:
    write_job(tmp_path, shapes={"w": (512, 512)})
    work = build_job(tmp_path)
    interrupt(work, 2)  # the integers, which lie first in the file, and a unit of the matrix
    assert any(record["type"] == "state" for record in read_journal(work / "journal.log"))
    watch = Watch()
    mergepipe.run(work, on_event=watch)
    assert set(watch.stages) == {"apply"}


def test_another_cut_another_ceiling_other_workers(job: Path, expected: dict[str, str]) -> None:
    for _ in range(2):
        interrupt(job / "work", 2)
        plan = json.loads((job / "work" / "plan.json").read_bytes())
        plan["chunk_bytes"] = 3 * plan["chunk_bytes"] + 1
        (job / "work" / "plan.json").write_text(json.dumps(plan))
    mergepipe.run(job / "work", workers=3, memory="1GiB")
    assert hashes(job / "merged") == expected


def test_building_again_keeps_the_work(job: Path, expected: dict[str, str]) -> None:
    interrupt(job / "work", 3)
    done = len(read_journal(job / "work" / "journal.log"))
    build_job(job)
    assert len(read_journal(job / "work" / "journal.log")) == done
    mergepipe.run(job / "work")
    assert hashes(job / "merged") == expected


def test_another_recipe_needs_force(job: Path) -> None:
    interrupt(job / "work", 3)
    with pytest.raises(WorkspaceError, match="--force"):
        build_job(job, overrides=["parameters.lambda=0.5"])
    build_job(job, overrides=["parameters.lambda=0.5"], force=True)
    assert not list((job / "merged").glob("*.part")), "the work of the other recipe is dropped"
    mergepipe.run(job / "work")


def test_restart_forgets(job: Path, expected: dict[str, str]) -> None:
    interrupt(job / "work", 4)
    watch = Watch()
    mergepipe.run(job / "work", restart=True, on_event=watch)
    assert not any("going on" in note for note in watch.notes)
    assert hashes(job / "merged") == expected
    with pytest.raises(OutputExistsError, match="finished model"):
        mergepipe.run(job / "work", restart=True)


def test_the_output_can_be_moved_until_work_begins(
    job: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work, elsewhere = str(job / "work"), job / "elsewhere"
    for refused in (job / "base", job / "base" / "inside"):
        with pytest.raises(OutputExistsError, match="lies in the model"):
            mergepipe.run(work, out=refused)
    monkeypatch.chdir(job)
    stop = StopAfter(2)
    with pytest.raises(Interrupted):
        mergepipe.run(work, workers=1, out="elsewhere", stop=stop, on_event=stop)  # type: ignore[arg-type]
    assert list(elsewhere.glob("*.part"))
    assert not (job / "merged").exists()
    before = sorted(path.name for path in elsewhere.iterdir())
    assert main(["run", "-w", work, "--out", str(job / "third"), "--quiet"]) == 6
    assert "has begun" in capsys.readouterr().err
    assert sorted(path.name for path in elsewhere.iterdir()) == before
    assert not (job / "third").exists()
    assert main(["run", "-w", work, "--out", "elsewhere", "--quiet"]) == 0, "the same folder is no move"
    assert hashes(elsewhere) == expected
    assert main(["run", "-w", work, "--out", str(job / "third")]) == 6
    assert "is complete" in capsys.readouterr().err


def test_a_restart_may_move_the_output(job: Path, expected: dict[str, str]) -> None:
    interrupt(job / "work", 3)
    mergepipe.run(job / "work", out=job / "second", restart=True)
    assert not list((job / "merged").iterdir()), "the unfinished work is removed"
    mergepipe.run(job / "work", out=job / "third", restart=True)
    assert hashes(job / "second") == hashes(job / "third") == expected, "a finished output stays"


def test_restart_leaves_the_files_of_others(job: Path) -> None:
    """Nothing was begun, so nothing in the output folder is ours, whatever it is called."""
    (job / "merged").mkdir()
    (job / "merged" / "config.json").write_text("precious")
    for restart in (False, True):
        with pytest.raises(OutputExistsError, match="not empty"):
            mergepipe.run(job / "work", restart=restart)
    with pytest.raises(OutputExistsError):
        build_job(job)
    assert (job / "merged" / "config.json").read_text(encoding="utf-8") == "precious"


def test_other_versions_are_refused(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergepipe.pipeline.run.version", lambda name: "99.0")
    with pytest.raises(WorkspaceError, match=r"this is 99\.0"):
        mergepipe.run(job / "work")


def test_an_input_that_changed_is_refused_by_name(job: Path) -> None:
    interrupt(job / "work", 3)
    path = sorted((job / "expert-2").glob("*.safetensors"))[0]
    os.utime(path)
    with pytest.raises(InTheWayError, match=str(path)):
        mergepipe.run(job / "work")


SHRINK = """
import os, sys
from mergepipe.storage import readers
populate = readers._populate
def shrinks(mapping, fd, segment):
    populate(mapping, fd, segment)
    if segment.path == sys.argv[2]:
        os.truncate(segment.path, 100)
readers._populate = shrinks
import mergepipe
mergepipe.run(sys.argv[1], reader="mmap", workers=1)
"""


def test_an_input_that_shrinks_under_a_mapping_is_named(tmp_path: Path) -> None:
    """The process may die of it, which nobody can catch; the resume says whose fault it was."""
    write_job(tmp_path, {"w": (1024, 1024)})
    work = build_job(tmp_path, chunk_size="2MiB")
    path = tmp_path / "expert-1" / "model.safetensors"
    done = subprocess.run([sys.executable, "-c", SHRINK, str(work), str(path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS or "truncated" in done.stderr, done
    with pytest.raises(InTheWayError, match=f"'{path}' changed since the plan was made"):
        mergepipe.run(work)


def test_an_input_that_changes_during_the_run_is_noticed(job: Path) -> None:
    path = sorted((job / "expert-2").glob("*.safetensors"))[0]

    def touch(event: Event) -> None:
        if isinstance(event, UnitFinished):
            os.utime(path)

    with pytest.raises(InTheWayError, match=str(path)):
        mergepipe.run(job / "work", on_event=touch)
    assert not (job / "merged" / "model.safetensors.index.json").exists()


def test_torn_statistics_stop_nobody(job: Path, expected: dict[str, str]) -> None:
    interrupt(job / "work", 4)
    for path in (job / "work" / "statistics").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    mergepipe.run(job / "work")
    assert hashes(job / "merged") == expected


def test_the_event_log(job: Path) -> None:
    interrupt(job / "work", 3)
    mergepipe.run(job / "work")
    lines = [json.loads(line) for line in (job / "work" / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds.count("RunStarted") == 2
    assert kinds.count("Stopped") == 1
    assert kinds[-1] == "RunFinished"
    assert kinds.count("ShardSealed") == 2
    assert all(line["at"] > 1e9 for line in lines)


# ── copied stores ──


def test_a_copied_store_is_kept(tmp_path: Path, expected: dict[str, str]) -> None:
    write_job(tmp_path, shards=2)
    work = build_job(tmp_path, store="copy")
    interrupt(work, 3)
    build_job(tmp_path, store="copy")
    mergepipe.run(work)
    assert hashes(tmp_path / "merged") == expected


# ── handing over ──


def test_shards_are_handed_over_one_by_one(tmp_path: Path) -> None:
    """They may be moved away; a resume neither reads them nor misses them."""
    write_job(tmp_path, shapes=LARGER, shards=4)
    mergepipe.run(build_job(tmp_path))
    expected = {name: value for name, value in hashes(tmp_path / "merged").items() if name.endswith(".safetensors")}
    shutil.rmtree(tmp_path / "merged")
    shutil.rmtree(tmp_path / "work")
    work = build_job(tmp_path, shard_size="2MB")
    away = tmp_path / "away here"
    away.mkdir()
    most = 0

    def count(event: Event) -> None:
        nonlocal most
        # By number: a shard that is renamed while the folder is listed may show up under both names. Looked at again:
        # one that is moved away meanwhile may show up beside the one that took its room.
        listed = list((tmp_path / "merged").glob("*.safetensors*"))
        shards = {path.name.removesuffix(".part") for path in listed if path.exists()}
        most = max(most, len(shards))

    limit = f"test $(ls '{away}' | wc -l) -lt 3 && mv {{path}} '{away}'"
    with pytest.raises(HandOverError, match="failed with exit code 1"):
        mergepipe.run(work, on_shard=limit, on_event=count)
    assert most <= 3, "a few shards at a time"
    assert len(list(away.iterdir())) == 3
    result = mergepipe.run(work, on_shard=f"mv {{path}} '{away}'", on_event=count)
    assert most <= 3
    assert not list((tmp_path / "merged").glob("*.safetensors"))
    shards = result.manifest["shards"]
    assert len(shards) == len(list(away.iterdir()))
    assert all(shard["handed_over"] for shard in shards)
    for shard in shards:
        assert shard["sha256"] == hashes(away)[shard["file"]]
    assert not verify(tmp_path / "merged", full=True).damage
    assert len(expected) == 4


def test_shards_left_unsealed_count_among_those_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that died before it sealed three shards leaves them on disk: the next opens no fourth beside them."""
    write_job(tmp_path, shapes=LARGER)
    work = build_job(tmp_path, shard_size="2MB")
    stop = threading.Event()
    made = []

    def stop_after_three(event: Event) -> None:
        if isinstance(event, TensorFinished) and "norm" not in event.name:
            made.append(event.name)
            if len(made) == 3:
                stop.set()

    with monkeypatch.context() as patched:
        patched.setattr(Shards, "_seal", lambda self, shard: None)
        with pytest.raises(Interrupted):
            mergepipe.run(work, workers=1, stop=stop, on_event=stop_after_three, on_shard="true {path}")
    assert len(list((tmp_path / "merged").glob("*.part"))) == 3
    most, seal = 0, Shards._seal_now

    def late(self: Shards, number: int) -> SealedShard:
        nonlocal most
        time.sleep(0.2 if number < 2 else 0)
        most = max(most, len(list((tmp_path / "merged").glob("*.part"))))
        return seal(self, number)

    monkeypatch.setattr(Shards, "_seal_now", late)
    mergepipe.run(work, on_shard="rm {path}")
    assert most == 3


def test_a_shard_that_is_taken_away_while_it_is_checked_is_made_again(
    job: Path, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was killed leaves its command behind, which may move the shard while the next run reads it."""
    with pytest.raises(HandOverError):
        mergepipe.run(job / "work", on_shard="false {path}")
    believed, gone = recheck.matches, []

    def take_away(path: Path, *rest: Any) -> bool:
        path.unlink()
        gone.append(path.name)
        return believed(path, *rest)

    monkeypatch.setattr(recheck, "matches", take_away)
    mergepipe.run(job / "work")
    assert gone, "a shard was complete"
    assert hashes(job / "merged") == expected


def test_a_single_file_is_handed_over_last(tmp_path: Path) -> None:
    write_job(tmp_path)
    work = build_job(tmp_path)
    seen = tmp_path / "seen"
    with pytest.raises(UsageError, match=r"\{path\}"):
        mergepipe.run(work, on_shard="true")
    with pytest.raises(HandOverError):
        mergepipe.run(work, on_shard="false {path}")
    for _ in range(2):
        mergepipe.run(work, on_shard=f"echo {{path}} >> '{seen}'")
    assert seen.read_text(encoding="utf-8").splitlines() == [str(tmp_path / "merged" / "model.safetensors")]


# ── Ctrl-C ──

SLOW = """
import sys, time
from mergepipe.tasks import nodes
apply = nodes.TensorWork.apply
def slowly(self, *args):
    time.sleep(0.3)
    apply(self, *args)
nodes.TensorWork.apply = slowly
from mergepipe.cli.main import main
sys.exit(main(["run", "-w", sys.argv[1], "--workers", "1"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_and_the_second_aborts(tmp_path: Path, number: signal.Signals) -> None:
    write_job(tmp_path, shapes=LARGER, method="linear")
    work = build_job(tmp_path)
    for signals in (1, 2):
        command = [sys.executable, "-c", SLOW, str(work)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not any(record["type"] == "begin" for record in read_journal(work / "journal.log")[-1:]):
            assert process.poll() is None
            time.sleep(0.02)
        time.sleep(0.7)
        before = len(read_journal(work / "journal.log"))
        for _ in range(signals):
            process.send_signal(number)
            time.sleep(0.05)
        _, told = process.communicate(timeout=60)
        assert process.returncode == 130, told
        assert "once more ends at once" in told
        if signals == 1:
            assert f"mergepipe run --work {work}" in told
            assert len(read_journal(work / "journal.log")) > before, "what was under way is kept"
    watch = Watch()
    mergepipe.run(work, on_event=watch)
    assert "going on" in watch.notes[0]


def test_usage(capsys: pytest.CaptureFixture[str], job: Path) -> None:
    assert main(["run", "-w", str(job / "work"), "--on-shard", "true"]) == 2
    capsys.readouterr()
