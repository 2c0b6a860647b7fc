"""`mergepipe demo`: experts trained on the spot, merged, and judged.

Two families of tiny transformers, each a base and four experts, are trained from data that a dependency ships, without
network: pictures (:mod:`.vision`, float32, one file) and text (:mod:`.text`, bfloat16, several shards). They are
written as transformers writes any model, merged through the same `build` and `run` that users call (:mod:`.merges`),
and every merge is loaded with `from_pretrained` and asked the questions of every task (:mod:`.table`).

The base of a family learns all its tasks from clean data; each expert is fine-tuned for one of them under bad
conditions (noise, typing errors), and it is these conditions that accuracy is measured in. So a merge can gain twice:
from what each expert learnt about its own task, and from what all learnt about the conditions.

A third family is a pair of models that write (:mod:`.language`), opposite in what they were fine-tuned for and with
other added tokens and chat templates: :mod:`.language_merges` measures how surprised each merge is by the text of each,
how stable it writes, and whether the divergence of weight rows, which SCF-RKL goes by, ranks merges and tensors as the
divergence of their outputs does; :mod:`.language_table` shows it.

What it shows is what comes out, whichever method wins; lambda is the default, or chosen on validation data where the
table says so. What it does not show: how large models behave. The same seed gives the same table on the same machine.
The quick demo leaves out the pair, SCF-RKL and all hosts of TADrop but two.

=======================  =========================================================================
:mod:`.show`             runs the families side by side, prints the tables
:mod:`.training`         tasks, optimiser, fine-tuning, accuracy
:mod:`.vision`           pictures: data and models
:mod:`.text`             text that is classified: data and models
:mod:`.merges`           recipes, `build` and `run`, accuracy of what comes out, lambda by validation
:mod:`.table`            the table of accuracies
:mod:`.language`         text that is written: data, a base and two experts
:mod:`.language_merges`  merges of the pair, their stability, the test of the proxy
:mod:`.language_table`   the table of the pair
=======================  =========================================================================
"""

from __future__ import annotations

from importlib.util import find_spec

import click

from mergepipe.errors import UsageError


@click.command("demo")
@click.argument("folder", metavar="[DIR]", default="mergepipe-demo", type=click.Path(file_okay=False))
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Another seed, other models.")
@click.option("--quick", is_flag=True, help="Train less, merge in fewer ways: a minute instead of several.")
def command(folder: str, seed: int, quick: bool) -> None:
    """Train small experts, merge them in several ways, and print how accurate each merge is.

    Needs no network. Recipes, experts and merges stay in DIR (./mergepipe-demo by default) to be looked at.

    \b
    Example:
      mergepipe demo --quick
      mergepipe demo ./demo --seed 7
    """
    missing = [name for name in ("sklearn", "transformers") if find_spec(name) is None]
    if missing:
        raise UsageError(f"the demo needs {' and '.join(missing)}: pip install 'mergepipe[demo]'")
    from mergepipe.cli.demo.show import show

    show(folder, seed=seed, quick=quick)
