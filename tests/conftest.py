"""Settings of all tests; warnings, markers and strictness are set in pyproject.toml, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest

# A busy machine is no fault of the code, and the first call of a kernel compiles it: no deadline. The same examples in
# every run, so that a red run can be looked at again.
hypothesis.settings.register_profile("mergepipe", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("mergepipe")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread of torch: tiny models gain nothing from a second, and lose much where other work has it."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
