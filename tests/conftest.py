"""Settings of all tests; warnings, markers and strictness are set in pyproject.toml, each with its reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

from support.tally import TALLY

# A busy machine is no fault of the code, and the first call of a kernel compiles it: no deadline. The same examples in
# every run, so that a red run can be looked at again.
hypothesis.settings.register_profile("mergepipe", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("mergepipe")

# Where bytecode is not kept, each process that a test starts would compile our modules for a second, and each of those
# that run tests would rewrite all assertions.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Benchmarks come last: what their processes would compile for themselves, whole merges have compiled by then."""
    items.sort(key=lambda item: item.path.parent.name == "test_benchmarks")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send what this process has survived to the one that tells it, where several run tests."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output["faults"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Receive that from a process that has ended."""
    TALLY.update(getattr(node, "workeroutput", {}).get("faults", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Tell at the end how many faults were injected and survived."""
    if TALLY:
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(TALLY.items()))
        terminalreporter.write_line(f"faults injected and survived: {sum(TALLY.values())} ({told})")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: tiny models gain nothing from a second, and lose much where other work has it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
