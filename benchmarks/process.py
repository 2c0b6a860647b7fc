"""Runs a merge in a process of its own and measures that process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Usage:
    """What a finished process used.

    Attributes
    ----------
    wall_s, cpu_s : float
        Elapsed, and user plus system time of all its threads.
    peak_rss : int
        Peak resident bytes, mapped files included.
    peak_anonymous : int
        Peak anonymous resident bytes, sampled; 0 if it was not watched.
    """

    wall_s: float
    cpu_s: float
    peak_rss: int
    peak_anonymous: int = 0


def measure(command: Sequence[str], watch: bool = False, environment: dict[str, str] | None = None) -> Usage:
    """Run a command to its end.

    Parameters
    ----------
    command : sequence of str
    watch : bool
        Whether to sample the process's anonymous memory every 10 ms.
    environment : dict, optional
        Variables to set besides the present ones.

    Raises
    ------
    RuntimeError
        If it fails; with the end of its output.
    """
    began = time.perf_counter()
    # Where bytecode is not kept, every start compiles our modules anew: a setting of developers, not of users.
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(
        command,
        env={**kept, **(environment or {})},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None, "stderr was asked for"
    os.set_blocking(process.stderr.fileno(), False)
    said, peak = b"", 0
    while True:
        pid, status, used = os.wait4(process.pid, os.WNOHANG)
        said = (said + (process.stderr.read() or b""))[-4000:]
        if pid:
            break
        peak = max(peak, anonymous_bytes(process.pid)) if watch else 0
        time.sleep(0.01)
    wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said.decode(errors='replace')}")
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, peak)


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process now; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def ties_recipe(folders: Sequence[Path], density: float = 0.2) -> dict[str, Any]:
    """TIES over a base (the first) and its experts, computed in float32 by mergepipe and mergekit alike."""
    base, *experts = folders
    return {
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(path), "parameters": {"weight": 0.5, "density": density}} for path in experts],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def build(recipe: dict[str, Any], folder: Path, *options: str) -> Usage:
    """Write the recipe into `folder` and build ``folder/work``, with the output at ``folder/merged``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places = ["-w", str(folder / "work"), "--out", str(folder / "merged")]
    return measure([sys.executable, "-m", "mergepipe", "build", str(folder / "recipe.yaml"), *places, *options])


def run(folder: Path, *options: str, watch: bool = False) -> Usage:
    """Run what `build` put into ``folder/work``."""
    command = [sys.executable, "-m", "mergepipe", "run", "-w", str(folder / "work"), "--quiet", *options]
    return measure(command, watch=watch)


def run_mergekit(python: str, recipe: dict[str, Any], folder: Path) -> Usage:
    """The same recipe with mergekit, in the environment of the given Python; the output is ``folder/theirs``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [python, "-c", "from mergekit.scripts.run_yaml import main; main()", str(folder / "recipe.yaml")]
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet"]
    environment = {"PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    return measure([*command, str(folder / "theirs"), *options], watch=True, environment=environment)


def run_torch(recipe: dict[str, Any], folder: Path) -> Usage:
    """The same recipe with :mod:`benchmarks.torch_merge`; the output is ``folder/theirs``, and is not synced.

    The inputs count in `peak_rss` alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "benchmarks.torch_merge", str(folder / "recipe.yaml"), str(folder / "theirs")]
    return measure(command, watch=True)
