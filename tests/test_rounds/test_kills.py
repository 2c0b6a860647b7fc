"""Killed at any moment of its rounds or of its masks, a merge ends in the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mergepipe
from support import whole

RECIPES: dict[str, dict[str, Any]] = {
    "masks": {"merge_method": "emr_unified", "sparsify": {"method": "tadrop", "target_density": 0.5}},
    "scope": {"merge_method": "ties", "scope": "model", "parameters": {"density": 0.3, "weight": 1.0}},
}

VICTIM = """
import random, os, signal, sys, threading, time
import mergepipe
from mergepipe.pipeline.events import UnitFinished
from mergepipe.pipeline.commits import Committer
Committer.__init__.__kwdefaults__.update(max_bytes=1, max_seconds=0.01)
left = [int(sys.argv[2])]
def listen(event):
    left[0] -= isinstance(event, UnitFinished)
    if left[0] <= 0:
        time.sleep(float(sys.argv[3]))
        os.kill(os.getpid(), signal.SIGKILL)
mergepipe.run(sys.argv[1], workers=2, on_event=listen)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_again_and_again(tmp_path: Path, name: str) -> None:
    base, experts = whole.family(15, shapes={"a": (90_000,), "b": (7, 30_001), "c": (3,), "d": ()})
    whole.merged(tmp_path, base, experts, RECIPES[name])
    expected = contents(tmp_path / "merged")
    mergepipe.build(
        tmp_path / "recipe.yaml", work=tmp_path / "w", out=tmp_path / "out", memory="3GiB", chunk_size="64KiB"
    )
    rng = random.Random(name)
    deaths = 0
    while deaths < 12:
        after = str(rng.randrange(1, 40))
        args = [sys.executable, "-c", VICTIM, str(tmp_path / "w"), after, str(rng.choice([0, 0.02]))]
        end = subprocess.run(args, check=False, capture_output=True, text=True)
        assert end.returncode in (0, -signal.SIGKILL), end.stderr
        if end.returncode == 0:
            break
        deaths += 1
    assert deaths > 1
    mergepipe.run(tmp_path / "w")
    assert contents(tmp_path / "out") == expected


def contents(folder: Path) -> dict[str, bytes]:
    """Weights and masks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}
