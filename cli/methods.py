"""`mergepipe methods`: the merge methods as they declare themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergepipe.cli.options import json_option, print_json

if TYPE_CHECKING:
    from mergepipe.tasks.method import Job, MergeMethod, Sparsifier
    from mergepipe.tasks.parameter import Parameter

BASES = {
    "required": "needs a base, from which task vectors are taken",
    "primary": "the base is one of the models merged",
    "optional": "merges task vectors if there is a base, else the models themselves",
    "ignored": "needs no base; one that is given lends its configuration",
}


@click.command("methods")
@click.argument("name", required=False)
@json_option
def command(name: str | None, as_json: bool) -> None:
    """List the merge methods, or tell all about one.

    \b
    Example:
      mergepipe methods
      mergepipe methods ties
    """
    from mergepipe.tasks.registry import METHODS, SPARSIFIERS

    if name is not None:
        entry = describe(_find(name))
        print_json(entry) if as_json else _print_details(entry)
        return
    methods = [describe(method) for method in METHODS.values()]
    sparsifiers = [describe(sparsifier) for sparsifier in SPARSIFIERS.values()]
    if as_json:
        print_json({"methods": methods, "sparsifiers": sparsifiers})
        return
    _print_list("methods (merge_method: ...)", methods)
    _print_list("sparsifiers (sparsify: ...)", sparsifiers)
    click.echo("`mergepipe methods NAME` tells more; * marks values that each model may have of its own.")


def _find(name: str) -> MergeMethod | Sparsifier:
    from mergepipe.tasks.registry import METHODS, SPARSIFIERS, method

    return SPARSIFIERS[name] if name in SPARSIFIERS and name not in METHODS else method(name)


def describe(declared: MergeMethod | Sparsifier) -> dict[str, Any]:
    """A declaration as plain values, as ``--json`` prints it."""
    from mergepipe.tasks.method import MergeMethod

    entry: dict[str, Any] = {
        "name": declared.name,
        "kind": "method" if isinstance(declared, MergeMethod) else "sparsifier",
        "title": declared.title,
        "summary": declared.summary,
        "parameters": [_parameter(parameter) for parameter in declared.parameters],
        "sweeps": [sweep.name for sweep in declared.reductions(sample_job(declared))] + ["apply"],
        "paper": {"title": declared.paper.title, "url": declared.paper.url} if declared.paper else None,
        "specification": declared.specification,
        "known": list(declared.known),
        "chosen": list(declared.chosen),
    }
    if isinstance(declared, MergeMethod):
        entry |= {
            "base": declared.base,
            "min_models": declared.min_models,
            "max_models": declared.max_models,
            "trim": declared.trim,
            "importance": declared.importance,
            "takes": declared.takes,
        }
    return entry


def _parameter(parameter: Parameter) -> dict[str, Any]:
    from mergepipe.tasks.parameter import REQUIRED

    required = parameter.default is REQUIRED
    return {
        "name": parameter.name,
        "kind": parameter.kind,
        "doc": parameter.doc,
        "required": required,
        "default": None if required else parameter.default,
        "expected": parameter.expected,
        "per_model": parameter.per_model,
        "minimum": parameter.minimum,
        "maximum": parameter.maximum,
        "choices": list(parameter.choices),
        "without_effect": parameter.without_effect,
    }


def example_value(parameter: Parameter) -> Any:
    """The default of a parameter, or something sensible within its bounds."""
    from mergepipe.tasks.parameter import REQUIRED

    if parameter.default is not REQUIRED:
        return parameter.default
    if parameter.kind in ("number", "integer"):
        return 1 if parameter.kind == "integer" else 1.0 if parameter.per_model else 0.5
    return {"flag": True, "choice": next(iter(parameter.choices), None), "patterns": [], "rank": "auto"}[parameter.kind]


def sample_job(declared: MergeMethod | Sparsifier) -> Job:
    """A matrix and parameters with which the method has all its sweeps to do."""
    import numpy as np

    from mergepipe.tasks.method import Job, MergeMethod
    from mergepipe.tasks.registry import SPARSIFIERS, trim_parameters

    values = {p.name: 0.5 if (p.minimum, p.default) == (0, 1) else example_value(p) for p in declared.parameters}
    work = np.dtype(np.float32)
    if not isinstance(declared, MergeMethod):
        return Job("sample", (1024, 1024), 1, work, {}, ({},), declared.name, (values,))
    models = max(declared.min_models, min(2, declared.max_models or 2))
    trims = trim_parameters(declared, (values,) * models) if declared.trim in SPARSIFIERS else ()
    return Job("sample", (1024, 1024), models, work, values, (values,) * models, declared.trim, trims)


def _print_list(heading: str, entries: list[dict[str, Any]]) -> None:
    click.echo(heading)
    width = max((len(entry["name"]) for entry in entries), default=0)
    for entry in entries:
        names = [p["name"] + "*" * p["per_model"] for p in entry["parameters"] if not p["without_effect"]]
        click.echo(f"  {entry['name']:{width}}  {entry['summary']}")
        if names:
            click.echo(f"  {'':{width}}  parameters: {', '.join(names)}")
    click.echo()


def _print_details(entry: dict[str, Any]) -> None:
    click.echo(f"{entry['name']}: {entry['title']}\n{entry['summary']}\n")
    if entry["kind"] == "method":
        most = entry["max_models"]
        count = f"{entry['min_models']} or more" if most is None else f"{entry['min_models']} to {most}"
        click.echo(f"base           {BASES[entry['base']]}")
        click.echo(f"{entry['takes']:14} {entry['min_models'] if most == entry['min_models'] else count}")
        click.echo(f"sparsifier     {entry['trim']}")
        if entry["importance"]:
            click.echo("importances    a checkpoint for each model, `importance: FOLDER` beside it")
    click.echo(f"sweeps         up to {len(entry['sweeps'])}: {', '.join(entry['sweeps'])}")
    if entry["paper"]:
        click.echo(f"paper          {entry['paper']['title']}, {entry['paper']['url']}")
    click.echo(f"specification  {entry['specification']}")
    for heading in ("known", "chosen"):
        for line in entry[heading]:
            click.echo(f"  {heading:7} {line}")
    if entry["parameters"]:
        click.echo("\nparameters")
    for p in entry["parameters"]:
        default = "required" if p["required"] else "not set" if p["default"] is None else _plain(p["default"])
        scope = ", per model" if p["per_model"] else ""
        click.echo(f"  {p['name']} ({default}{scope}): {p['doc']}")
        click.echo(f"      {p['expected']}{'; accepted, without effect' if p['without_effect'] else ''}")


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "empty"
    return str(value).lower() if isinstance(value, bool) else str(value)
