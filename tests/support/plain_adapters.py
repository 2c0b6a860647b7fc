"""Little LoRA adapters, and the float64 values of the model that they make."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

F64 = npt.NDArray[np.float64]


def write_adapter(
    folder: Path, model: Mapping[str, F64], names: Sequence[str], seed: int, rank: int = 2
) -> dict[str, F64]:
    """An adapter of the matrices `names`; all values of the model with it."""
    rng = np.random.default_rng(seed)
    factors, made = {}, dict(model)
    for name in names:
        rows, width = model[name].shape
        a = rng.normal(size=(rank, width)).astype(np.float32)
        b = rng.normal(size=(rows, rank)).astype(np.float32)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
        made[name] = model[name] + b.astype("f8") @ a.astype("f8")
    folder.mkdir(parents=True)
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return made
