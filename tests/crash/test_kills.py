"""Killed at any moment, a merge goes on where it was and ends in the same bytes."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from .conftest import Job

SAMPLE = 6
"""Moments tried in `make test`; `make test-all` tries them all."""


def moments(calls: int, count: int) -> list[int]:
    """`count` numbers of calls spread evenly over all, the first and the last among them."""
    return sorted({1 + round(i * (calls - 1) / (count - 1)) for i in range(count)})


def suffer(job: Job, kind: str, at: int, rng: random.Random) -> None:
    """Die at call `at`, die again on the way back, and then go on to the end."""
    ends = [job.live(kind, at, seed=rng.randrange(2**32))]
    if ends[0]["end"] == "killed":
        ends.append(job.live(kind, rng.randrange(1, job.calls), seed=rng.randrange(2**32)))
    assert all(end["end"] in ("killed", "done") for end in ends), ends
    job.finish()
    job.survived(kind, sum(end["end"] == "killed" for end in ends))


@pytest.mark.parametrize("kind", ["kill", "torn", "power"])
def test_dies_at_some_calls(small: Job, kind: str) -> None:
    rng = random.Random(kind)
    for at in moments(small.calls, SAMPLE):
        suffer(small, kind, at, rng)


def test_dies_while_it_measures(sharded: Job) -> None:
    """`--diagnostics` goes on where it was, and the manifest says what it would have said."""
    how: dict[str, Any] = {"options": {"workers": 1, "diagnostics": True}}

    def found() -> Any:
        return json.loads((sharded.merged / "mergepipe_manifest.json").read_text())["tensors"]

    sharded.reset()
    calls = sharded.live(**how)["calls"]
    expected = found()
    assert all({"change", "kept_norms"} <= own.keys() for name, own in expected.items() if "empty" not in name)
    sharded.reset()
    for kind, at in zip(("kill", "torn", "power"), moments(calls - sharded.calls, 5)[1:4], strict=True):
        killed = sharded.live(kind, sharded.calls + at, **how)["end"] == "killed"
        assert sharded.live(**how)["end"] == "done"
        assert found() == expected
        sharded.reset()
        sharded.survived(kind, killed)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kill", "torn", "power"])
def test_dies_at_every_call(small: Job, kind: str) -> None:
    rng = random.Random(kind)
    for at in range(1, small.calls + 3):
        suffer(small, kind, at, rng)


@pytest.mark.slow
def test_dies_at_random_moments(larger: Job) -> None:
    """Two hundred kills that no call marks: each life of the job lasts for a random time, until one reaches the end."""
    rng = random.Random(0)
    kills = 0
    while kills < 200:
        end = larger.live("later", seconds=rng.uniform(0.005, 0.25), options={"workers": 3})
        assert end["end"] in ("killed", "done"), end
        kills += end["end"] == "killed"
        if end["end"] == "done":
            larger.finish()
    larger.finish()
    larger.survived("kill at a random moment", kills)
