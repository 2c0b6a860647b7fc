"""Threads that are looked at: what they do is found by names, which have to be those of functions that there are."""

from __future__ import annotations

import ast
import threading
import time
from pathlib import Path

import pytest

from benchmarks.watched import KINDS, Watch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("function", [function for functions in KINDS.values() for function in functions])
def test_there_is_such_a_function(function: str) -> None:
    file, name = function.split(":")
    nodes = ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8")))
    assert name in {node.name for node in nodes if isinstance(node, ast.FunctionDef)}


def test_what_threads_do() -> None:
    """One that computes is seen with the processor time that it takes, one that waits for it with none."""
    over = threading.Event()

    def compute() -> None:
        ended = time.thread_time() + 0.2
        while time.thread_time() < ended:
            pass
        over.set()

    with Watch() as watch:
        threads = [threading.Thread(target=compute), threading.Thread(target=over.wait)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert max(one["seen"]["rest"] for one in watch.instants) >= 1
    assert max(one["seen"]["waiting"] for one in watch.instants) >= 2
    assert 0.1 < sum(one["cpu_s"]["rest"] for one in watch.instants) < 1
    assert [one["at"] for one in watch.instants] == sorted(one["at"] for one in watch.instants)
