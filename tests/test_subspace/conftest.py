"""The tests of solvers run on every device there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support import matrices
from support.gpu import needs_cuda


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda:0", marks=needs_cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where matrices are worked on."""
    matrices.DEVICE = request.param
    yield matrices.DEVICE
    matrices.DEVICE = "cpu"
