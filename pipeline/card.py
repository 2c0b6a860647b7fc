"""The model card: a README.md that says what was merged, how, and by what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mergepipe.pipeline.plan import Plan
from mergepipe.storage.checkpoint import CONFIG
from mergepipe.tasks.method import MergeMethod, Sparsifier
from mergepipe.tasks.registry import SPARSIFIERS
from mergepipe.tasks.registry import method as find_method

CARRIED = """# Merged task vectors

What [mergepipe](https://pypi.org/project/mergepipe/) {version} has added up with {title}, before it was scaled and put
on the base: no model. `mergepipe run --add MODEL` goes on from here. If no model is ever to be added, remove it.
"""


def model_card(plan: Plan) -> str:
    """Text of the card: front matter for the hub, the models, the method with its paper, the recipe."""
    method = find_method(plan.recipe["merge_method"])
    if plan.sidecar is None:
        return CARRIED.format(version=plan.version, title=method.title)
    models = [m for m in (*plan.models[:1], *plan.merged_before, *plan.models[1:]) if m.role != "carried"]
    began = [model.public for model in models if not model.made and model.role != "importance"]
    began += [label for earlier in plan.earlier for label in earlier.models]
    is_model = (Path(plan.models[plan.sidecar].path) / CONFIG).exists()
    library = "peft" if plan.stem == "adapter_model" else "transformers" if is_model else None
    front: dict[str, Any] = {
        "base_model": list(dict.fromkeys(name.partition("@")[0] for name in began)),
        **({"library_name": library} if library else {}),
        # The first two are what the hub's readers and the tools around mergekit look merges up by.
        "tags": ["mergekit", "merge", "mergepipe", method.name],
    }
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", "# A merge", ""]
    lines += [f"Made by [mergepipe](https://pypi.org/project/mergepipe/) {plan.version} with {method.title}.", ""]
    lines += ["## Method", "", method.summary]
    for name, declared in reconstructions(plan).items():
        which = "This" if name == method.name else f"`{name}`, which it uses,"
        lines += [
            "",
            f"{which} is a reconstruction, `{declared.specification}`: it does not claim to be the authors' method.",
        ]
    if method.paper is not None:
        lines += ["", f"Paper: [{method.paper.title}]({method.paper.url})"]
    lines += ["", "## Models", ""]
    roles = {"base": " (base)", "importance": " (importances)", "model": ""}
    lines += [f"* `{model.public}`{roles[model.role]}{', a merge itself' if model.made else ''}" for model in models]
    recipes = [*(earlier.recipe for earlier in plan.earlier), plan.recipe]
    lines += ["", "## Recipe", "", "```yaml", yaml.safe_dump_all(recipes, sort_keys=False, allow_unicode=True).strip()]
    lines += ["```", ""]
    return "\n".join(lines)


def reconstructions(plan: Plan) -> dict[str, MergeMethod | Sparsifier]:
    """The methods and sparsifiers of a plan whose specification is ours, by name, in alphabetical order."""
    merged = [tensor for stage in plan.stages for tensor in stage.tensors if tensor.action == "merge"]
    used: dict[str, MergeMethod | Sparsifier] = {name: find_method(name) for name in {t.method for t in merged}}
    used |= {name: SPARSIFIERS[name] for name in {t.sparsify for t in merged} & SPARSIFIERS.keys()}
    return {name: declared for name, declared in sorted(used.items()) if declared.specification != "published"}
