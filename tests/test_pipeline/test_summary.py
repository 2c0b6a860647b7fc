"""What a plan says of its memory and its reads follows from the ceiling."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import mergepipe
from mergepipe.pipeline.summary import summarize
from mergepipe.storage.header import encode_header
from support.jobs import write_recipe

MIB = 1 << 20


@pytest.fixture
def summary_at(tmp_path: Path) -> Any:
    """Summaries of a TIES merge of three models, each of four matrices of 128 MiB that are holes, by ceiling."""
    for name in ("base", "expert-1", "expert-2"):
        (tmp_path / name).mkdir()
        header = encode_header([(f"{n}.weight", "BF16", (16384, 4096)) for n in range(4)], {"format": "pt"})
        (tmp_path / name / "model.safetensors").write_bytes(header)
        os.truncate(tmp_path / name / "model.safetensors", len(header) + 512 * MIB)
        (tmp_path / name / "config.json").write_text("{}")
    recipe = write_recipe(tmp_path)

    def summary(memory: str) -> dict[str, Any]:
        work = tmp_path / f"work-{memory}"
        return summarize(mergepipe.build(recipe, work=work, out=tmp_path / "merged", memory=memory, workers=2))

    return summary


def test_what_does_not_fit_is_read_in_every_pass(summary_at: Any) -> None:
    small = summary_at("512MiB")
    assert small["requested_bytes"] > 2 * small["input_bytes"]
    # Less what the buffers hold where one pass turns into the next.
    turned = small["requested_bytes"] - small["read_bytes"]
    assert 0 < turned <= 3 * (small["projected_bytes"] - small["needed_bytes"]), "of each of three tensors"
    assert small["needed_bytes"] < small["projected_bytes"] <= 512 * MIB


def test_what_fits_is_read_once(summary_at: Any) -> None:
    large = summary_at("4GiB")
    assert large["read_bytes"] == large["input_bytes"] == 3 * 512 * MIB
    assert large["projected_bytes"] <= 2000 * MIB, "no more than all inputs is held"


def test_without_room_for_buffers_windows_are_mapped(summary_at: Any) -> None:
    least = summary_at("268MiB")
    assert least["needed_bytes"] <= least["projected_bytes"] <= 268 * MIB
    assert 0 <= least["requested_bytes"] - least["read_bytes"] < 4 * MIB
