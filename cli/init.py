"""`mergepipe init`: a commented recipe to start from, generated from what a method declares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergepipe.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from mergepipe.tasks.method import MergeMethod
    from mergepipe.tasks.parameter import Parameter

BASES = {
    "required": "base_model: ./base            # the common ancestor of the models: a folder",
    "primary": "base_model: ./primary         # one of the models merged: its tokenizer and configuration are kept",
    "optional": "# base_model: ./base          # the common ancestor: with it task vectors are merged, else weights",
    "ignored": "# base_model: ./base          # lends its tokenizer and configuration; the first model does without it",
}

CLOSING = """\
# A value may be a number, a list (a gradient over the layers), or a list of filters, first match wins:
#   weight:
#     - filter: mlp
#       value: [0.2, 0.8]
#     - value: 0.5

# rules:                      # another method for some tensors, first match wins
#   - match: "embed_tokens|lm_head"
#     merge_method: linear
# dtype: bfloat16             # of the output; by default each tensor's own, the base's
# seed: 0
output: ./merged
"""


@click.command("init")
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path), default="mergepipe.yaml")
@click.option("--method", "name", default="ties", show_default=True, help="Merge method; see `mergepipe methods`.")
def command(recipe: Path, name: str) -> None:
    """Write a commented recipe to start from.

    It is mergepipe.yaml unless RECIPE names another file.

    \b
    Example:
      mergepipe init --method slerp
    """
    from mergepipe.tasks.registry import method

    text = recipe_text(method(name))
    try:
        with recipe.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise OutputExistsError(f"'{recipe}' exists: name another file, or remove it first") from None
    except OSError as error:
        raise UsageError(f"'{recipe}' can't be written: {error.strerror}") from error
    click.echo(f"{recipe}: fill in your models, then run `mergepipe build`")


def recipe_text(method: MergeMethod) -> str:
    """A recipe for `method`, with every parameter that it has: required ones set, the others as comments.

    Examples
    --------
    >>> from mergepipe.tasks.registry import METHODS
    >>> print(recipe_text(METHODS["linear"]).splitlines()[3])
    merge_method: linear
    """
    from mergepipe.tasks.parameter import REQUIRED

    own = [p for p in method.parameters if p.per_model and not p.without_effect]
    shared = [p for p in method.parameters if not p.per_model and not p.without_effect]
    needed = [p for p in own if p.default is REQUIRED]
    most = method.max_models or 2
    lines = [
        "# `mergepipe build` checks this recipe and plans the merge, `mergepipe run` does it.",
        f"# {method.title}: {method.summary}",
        "",
        f"merge_method: {method.name}",
        BASES[method.base],
        "models:",
    ]
    for number in range(1, max(method.min_models, min(2, most)) + 1):
        lines.append(f"  - model: ./{method.takes.removesuffix('s')}-{number}")
        if method.importance:
            lines.append(f"    importance: ./importance-{number}   # a checkpoint of the same tensors, none negative")
        lines += _block(own if number == 1 else needed, "    ")
    lines += _block(shared, "")
    if method.space == "deltas":
        lines.append("# sparsify: tadrop            # thins the task vectors first; see `mergepipe methods`")
    return "\n".join([*lines, "", CLOSING])


def _block(parameters: list[Parameter], indent: str) -> Iterator[str]:
    """Lines of a `parameters:` mapping; all of it a comment if no parameter has to be given."""
    from mergepipe.cli.methods import example_value
    from mergepipe.tasks.parameter import REQUIRED

    if not parameters:
        return
    needed = any(p.default is REQUIRED for p in parameters)
    yield f"{indent}{'' if needed else '# '}parameters:"
    for p in parameters:
        mark = "" if p.default is REQUIRED else "# "
        setting = f"{indent}{mark}  {p.name}: {json.dumps(example_value(p))}"
        yield f"{setting:29} # {p.doc} ({p.expected})"
