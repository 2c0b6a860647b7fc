"""Runs mergekit, in its own environment, over many recipes in one process (its imports alone take seconds)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import yaml

_DRIVER = """
import json, sys, traceback
from importlib import import_module
main = import_module("mergekit.scripts." + sys.argv[1]).main
for folder in json.load(sys.stdin):
    options = ["--no-copy-tokenizer", "--no-write-model-card", "--quiet", *sys.argv[2:]]
    try:
        main([folder + "/recipe.yaml", folder + "/merged", *options], standalone_mode=False)
    except BaseException:
        open(folder + "/error.txt", "w").write(traceback.format_exc())
"""


def run_mergekit(
    python: Path, recipes: dict[str, dict[str, Any]], folder: Path, *options: str, script: str = "run_yaml"
) -> dict[str, Path]:
    """Merge each recipe into a folder of its own under `folder`.

    Parameters
    ----------
    python : Path
    recipes : dict
    folder : Path
    *options : str
        What else stands on the command line.
    script : {'run_yaml', 'merge_raw_pytorch'}
        mergekit's module behind `mergekit-yaml`, or that behind `mergekit-pytorch`.

    Returns
    -------
    dict
        Recipe name to the folder that holds ``merged``, or ``error.txt`` where mergekit failed.
    """
    folders = {name: folder / name for name in recipes}
    for name, recipe in recipes.items():
        folders[name].mkdir(parents=True)
        (folders[name] / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    subprocess.run(
        [str(python), "-c", _DRIVER, script, *options],
        input=json.dumps([str(path) for path in folders.values()]),
        env={**os.environ, "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=True, timeout=500,
    )  # fmt: skip
    return folders
