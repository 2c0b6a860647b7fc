"""The merges: recipes written to disk, the real `build` and `run`, and accuracy of what comes out.

A merge is judged as a user would use it: `materialize` puts each task's head back, `from_pretrained` loads the folder.
Only for the choice of lambda on validation data, and for experts under another task's head, are bodies swapped in
memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import yaml

import mergepipe
from mergepipe.cli.demo.table import Report, Row
from mergepipe.cli.demo.training import Family, Task, accuracy, head_of
from mergepipe.pipeline.materialize import materialize
from mergepipe.storage.checkpoint import open_checkpoint
from mergepipe.tasks.registry import METHODS

DENSITY = 0.2
"""What plain TIES keeps: the top fifth, as in its paper (mergekit's default keeps all)."""

LAMBDAS = (0.2, 0.3, 0.4, 0.6, 1.4)
FEWER_LAMBDAS = (0.3,)
QUICK_LAMBDAS = (0.3,)
"""Tried on validation data beside the default; the fewer ones on all but the first two hosts."""

DEFAULT_LAMBDA = 1.0

QUICK_HOSTS = ("task_arithmetic", "ties")
HOSTS = (*QUICK_HOSTS, "consensus", "pcb", "mda", "tsv_m", "iso_c", "emr_unified")
"""Methods on task vectors that are shown as they are, after TADrop, and after its control."""

QUANTILES = (0.9, 0.5)
"""Of SCF-RKL: its default, and half."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One way to merge: a name for the table, the method, and what stands in the recipe beside it."""

    name: str
    method: str
    parameters: Mapping[str, float] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def scaled(self) -> bool:
        """Whether the method takes a lambda."""
        return any(parameter.name == "lambda" for parameter in METHODS[self.method].parameters)

    @property
    def weighted(self) -> bool:
        """Whether each model has a weight."""
        return any(parameter.name == "weight" for parameter in METHODS[self.method].parameters)

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return "-".join(self.name.replace("+", "").replace(",", "").split())


class Judge:
    """Loads bodies and measures them under the head of each task."""

    def __init__(self, family: Family) -> None:
        self.family = family
        self.experts = {name: self.load(path) for name, path in family.experts.items()}
        self.heads = {name: head_of(expert) for name, expert in self.experts.items()}

    def load(self, folder: Path) -> Any:
        """The model in `folder`, ready to be asked, in float32."""
        return self.family.model_class.from_pretrained(folder, dtype=torch.float32).eval()

    def body_accuracies(self, body: Any, part: Literal["valid", "test"]) -> tuple[float, ...]:
        """Accuracy of the body of model `body` under each expert's head; it ends up with the last of them."""
        found = []
        for task in self.family.tasks:
            _set_head(body, self.heads[task.name])
            found.append(accuracy(body, getattr(task, part)))
        return tuple(found)

    def base_rows(self) -> list[Row]:
        """The base and the experts, under each task's head."""
        rows = [Row("base", self.body_accuracies(self.load(self.family.base), "test"), "base")]
        for name, expert in self.experts.items():
            rows.append(Row(f"expert {name}", self.body_accuracies(expert, "test"), "expert"))
        return rows

    def test_accuracies(self, merged: Path, folder: Path, tasks: Sequence[Task]) -> tuple[float | None, ...]:
        """Accuracy of the merge on test data, each of `tasks` materialised below `folder` and loaded from there."""
        found: list[float | None] = []
        for task in self.family.tasks:
            if task not in tasks:
                found.append(None)
                continue
            # The base's own head is in the merge itself; only slerp's base is an expert.
            beside = (merged / "heads" / task.name).is_dir()
            whole = materialize(merged, task=task.name, out=folder / task.name) if beside else merged
            found.append(accuracy(self.load(whole), task.test))
        return tuple(found)


def _set_head(model: Any, head: torch.nn.Linear) -> None:
    setattr(model, "classifier" if hasattr(model, "classifier") else "score", head)
    model.num_labels = model.config.num_labels = head.out_features


class Kitchen:
    """Merges one family, setting by setting, in folders of its own.

    Parameters
    ----------
    family : Family
    folder : Path
        Gets `recipes`, `work`, `merged` and `tasks`.
    quick : bool
        Try fewer lambdas.
    tell : callable
        Told the name of each merge once it is judged.
    """

    def __init__(self, family: Family, folder: Path, quick: bool, tell: Callable[[str], None]) -> None:
        self.family, self.folder, self.quick, self.tell = family, folder, quick, tell
        self.judge = Judge(family)

    def recipe(self, setting: Setting, scale: float | None) -> dict[str, Any]:
        """The recipe of all experts under `setting`."""
        parameters = dict(setting.parameters) | ({} if scale is None else {"lambda": scale})
        weight = {"parameters": {"weight": 1.0}} if setting.weighted else {}
        return {
            "merge_method": setting.method,
            "base_model": str(self.family.base),
            "models": [{"model": str(path), **weight} for path in self.family.experts.values()],
            **({"parameters": parameters} if parameters else {}),
            **setting.extra,
            "heads": "separate",
        }

    def merge(
        self, slug: str, recipe: Mapping[str, Any], store: Literal["auto", "copy"] = "auto"
    ) -> tuple[Path, float | None]:
        """Write `recipe`, build and run it; the merged folder and the overall realised density."""
        path = self.folder / "recipes" / f"{slug}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
        work = self.folder / "work" / slug
        mergepipe.build(path, work=work, out=self.folder / "merged" / slug, store=store)
        result = mergepipe.run(work)
        return result.output, overall_density(result.output, result.manifest["densities"])

    def cook(self, setting: Setting) -> list[Row]:
        """The rows of one setting: at its default scale, and at the one chosen on validation data if that differs."""
        if not setting.scaled:
            return [self._row(setting, None, *self.merge(setting.slug, self.recipe(setting, None)))]
        merges = {}
        scores = {}
        tried = QUICK_LAMBDAS if self.quick else LAMBDAS if setting.method in QUICK_HOSTS else FEWER_LAMBDAS
        for scale in (DEFAULT_LAMBDA, *tried):
            slug = setting.slug if scale == DEFAULT_LAMBDA else f"{setting.slug}-lambda-{scale:g}"
            merges[scale] = self.merge(slug, self.recipe(setting, scale))
            scores[scale] = self._validate(merges[scale][0])
        best = max(scores, key=lambda scale: scores[scale])
        rows = [self._row(setting, DEFAULT_LAMBDA, *merges[DEFAULT_LAMBDA])]
        return rows if best == DEFAULT_LAMBDA else [*rows, self._row(setting, best, *merges[best], chosen=True)]

    def _validate(self, merged: Path) -> float:
        """Mean accuracy on validation data; one task is materialised for its body."""
        task = self.family.tasks[0].name
        body = self.judge.load(materialize(merged, task=task, out=self.folder / "valid" / merged.name))
        return math.fsum(self.judge.body_accuracies(body, "valid"))

    def _row(
        self, setting: Setting, scale: float | None, merged: Path, density: float | None, chosen: bool = False
    ) -> Row:
        tasks = self.folder / "tasks" / merged.name
        accuracies = self.judge.test_accuracies(merged, tasks, self.family.tasks)
        self.tell(setting.name)
        kind: Literal["merge", "masks"] = "masks" if setting.method == "emr_unified" else "merge"
        return Row(setting.name, accuracies, kind, scale, chosen, density)

    def slerp(self) -> Row:
        """The first two experts, halfway; the other tasks' heads have no part in it."""
        first, second = list(self.family.experts.values())[:2]
        recipe = {
            "merge_method": "slerp",
            "base_model": str(first),
            "models": [{"model": str(second)}],
            "parameters": {"t": 0.5},
            "heads": "separate",
        }
        merged, _ = self.merge("slerp", recipe)
        accuracies = self.judge.test_accuracies(merged, self.folder / "tasks" / "slerp", self.family.tasks[:2])
        self.tell("slerp")
        return Row("slerp of two", accuracies, "merge")


def overall_density(merged: Path, densities: Mapping[str, Sequence[float]]) -> float | None:
    """Kept share of all task vectors' elements, from a manifest's densities per tensor and model; None without any."""
    tensors = open_checkpoint(merged).tensors
    sizes = {name: math.prod(tensors[name].shape) for name in densities}
    total = sum(sizes[name] * len(densities[name]) for name in densities)
    return math.fsum(sizes[name] * math.fsum(densities[name]) for name in densities) / total if total else None


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two checkpoints consist of the same weight files, bit for bit."""
    return _weights(one) == _weights(other)


def _weights(folder: Path) -> dict[str, str]:
    found = sorted(folder.rglob("*.safetensors"))
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def merge_family(family: Family, folder: Path, *, quick: bool, tell: Callable[[str], None]) -> Report:
    """All merges of one family.

    Parameters
    ----------
    family : Family
    folder : Path
        Where recipes, workspaces and merged checkpoints go.
    quick : bool
        Try fewer lambdas, on two hosts only, and no SCF-RKL.
    tell : callable
        Told the name of each merge once it is judged.
    """
    kitchen = Kitchen(family, folder, quick, tell)
    rows = kitchen.judge.base_rows()
    rows += kitchen.cook(Setting("linear", "linear"))
    rows.append(kitchen.slerp())
    for quantile in () if quick else QUANTILES:
        rows += kitchen.cook(Setting(f"scf_rkl, {quantile:g}", "scf_rkl", {"quantile": quantile}))
    for host in QUICK_HOSTS if quick else HOSTS:
        rows += kitchen.cook(Setting(host, host, {"density": DENSITY} if host == "ties" else {}))
        rows += _tadrop_and_control(kitchen, host)
    setting = Setting("ties + tadrop", "ties", extra={"sparsify": "tadrop"})
    copied, _ = kitchen.merge(f"{setting.slug}-from-copy", kitchen.recipe(setting, DEFAULT_LAMBDA), store="copy")
    return Report(
        title=family.title,
        tasks=tuple((task.name, len(task.classes), len(task.test.labels)) for task in family.tasks),
        rows=tuple(rows),
        copy_is_same=same_bytes(copied, folder / "merged" / setting.slug),
    )


def _tadrop_and_control(kitchen: Kitchen, method: str) -> list[Row]:
    """A method with TADrop, and with its overall density in every tensor instead, each at its best lambda."""
    tadrop = kitchen.cook(Setting(f"{method} + tadrop", method, extra={"sparsify": "tadrop"}))[-1]
    assert tadrop.density is not None, "tadrop reports its densities"
    # bfloat16 deltas tie so often that keeping all ties would keep more than TADrop did.
    control = {"sparsify": {"method": "magnitude", "density": tadrop.density, "tie_rule": "index"}}
    return [tadrop, kitchen.cook(Setting(f"{method} + uniform", method, extra=control))[-1]]
