"""Tests that run on every device there is: on the CPU always, on a GPU where CUDA is present."""

from __future__ import annotations

import pytest
import torch

NO_CUDA = "CUDA is not present on this machine"

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CUDA)

on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=needs_cuda)])
"""Gives a test `device`, as torch names it."""
