"""Adapters that both tools extract from the same fine-tune: the same products, where a matrix has one best pair."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergepipe.pipeline.extract import extract_lora
from mergepipe.pipeline.spool import Wanted
from support.checkpoints import write_family

pytestmark = pytest.mark.oracle

RANK = 8


def test_the_same_updates(mergekit_python: Path, tmp_path: Path) -> None:
    """mergekit's in float32, ours from float64: as near as the gap between singular values allows."""
    family = write_family(tmp_path, "llama", experts=1)
    script = mergekit_python.parent / "mergekit-extract-lora"
    command = [str(mergekit_python), str(script), "--model", str(family.experts[0]), "--base-model", str(family.base)]
    command += ["--out-path", str(tmp_path / "theirs"), "--max-rank", str(RANK), "--quiet"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, capture_output=True, check=False)  # its model card asks the hub
    made = extract_lora(family.base, family.experts[0], tmp_path / "ours", Wanted(RANK, svd="exact"))
    theirs, ours = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    config = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text(encoding="utf-8"))
    compared = 0
    for module in made.ranks:
        names = [f"base_model.model.{module}.lora_{side}.weight" for side in "BA"]
        if all(name in theirs for name in names):
            expected = theirs[names[0]].double() @ theirs[names[1]].double() * config["lora_alpha"] / RANK
            found = ours[names[0]].double() @ ours[names[1]].double()
            assert float(torch.linalg.matrix_norm(found - expected) / torch.linalg.matrix_norm(expected)) < 1e-3
            compared += 1
    assert compared == 14
