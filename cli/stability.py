"""`mergepipe stability`: repetition, loops, entropy and output divergence of a merged language model."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mergepipe.cli.options import json_option, print_json
from mergepipe.errors import UsageError

if TYPE_CHECKING:
    from mergepipe.pipeline.stability_report import PairReport, StabilityReport


@click.command("stability")
@click.argument("merged", metavar="MERGED", type=click.Path(path_type=Path))
@click.argument("parents", metavar="PARENT...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--prompts", required=True, type=click.Path(path_type=Path), metavar="FILE", help="One per line, or JSON lines."
)
@click.option("--tokens", default=128, show_default=True, type=click.IntRange(1, 32768), help="Most tokens written.")
@click.option("--n", default=4, show_default=True, type=click.IntRange(1, 64), help="Length of the n-grams.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of the sampling.")
@click.option(
    "--samples", default=1, show_default=True, type=click.IntRange(1, 1000), help="Drawn continuations per prompt."
)
@click.option(
    "--temperature",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0.01, 100),
    help="Of the sampling: below 1 favours probable tokens.",
)
@click.option(
    "--loop-repeats",
    default=3,
    show_default=True,
    type=click.IntRange(min=2),
    help="A loop is a block that stands this often back to back.",
)
@click.option(
    "--loop-span",
    default=16,
    show_default=True,
    type=click.IntRange(min=2),
    help="And that goes on for this many tokens at least.",
)
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda[:i]", help="Where the models run.")
@click.option(
    "--dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float32", "stored"]),
    help="What the weights are held in; stored takes half the memory for bfloat16.",
)
@json_option
def command(
    merged: Path,
    parents: tuple[Path, ...],
    prompts: Path,
    tokens: int,
    n: int,
    seed: int,
    samples: int,
    temperature: float,
    loop_repeats: int,
    loop_span: int,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Compare how a merged language model writes with how its parents do.

    Models are folders that transformers loads as they are: no hub ids, no +ADAPTER; `mergepipe build` with
    `merge_method: passthrough` makes such a folder of either.

    Every model continues every prompt, greedily and by seeded sampling (at --temperature, from the whole vocabulary).
    Shown of its continuations, the end token left out:

    \b
      repeated   of one continuation 1 - distinct n-grams / n-grams; the mean
                 over the continuations of at least n tokens
      loops      share of continuations in which one block of tokens stands
                 --loop-repeats times or more back to back, over --loop-span
                 tokens or more
      distinct   distinct n-grams of all continuations together over all
                 their n-grams
      entropy    of the distributions the tokens were chosen from, before
                 temperature, in nats: the mean over all tokens
      tokens'    entropy of the frequencies of the tokens in all
      entropy    continuations together, in nats

    Then both read the same texts, and KL(p || q), the sum of p * log(p / q) over the vocabulary, is averaged over
    positions: every place of the prompts with a token before it; and the places of the continuations, KL(merged ||
    parent) on those of the merged model, KL(parent || merged) on those of the parent. Beside it stands the same of
    the softmaxed rows of their weights, averaged over all rows: the proxy that SCF-RKL works with.

    FILE holds one prompt per line (blank lines are left out) in UTF-8; with a name in .jsonl or .ndjson one JSON value
    per line, a string or an object with the key "prompt". At most 1,000 prompts and 4 MiB.

    Models are folders with safetensors and a tokenizer; two are in memory at a time. The same seed gives the same
    numbers on the same machine. Needs the extra: pip install 'mergepipe[eval]'

    \b
    Example:
      mergepipe stability ./merged ./instruct ./reasoning --prompts prompts.txt
      mergepipe stability ./merged ./instruct --prompts chat.jsonl --tokens 256 --json
    """
    if find_spec("transformers") is None:
        raise UsageError("`mergepipe stability` needs transformers: pip install 'mergepipe[eval]'")
    check_device(device)
    from mergepipe.pipeline.prompts import read_prompts

    texts = read_prompts(prompts)
    import transformers

    from mergepipe.pipeline.stability_report import Settings, measure_stability

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings(
        tokens=tokens,
        n=n,
        seed=seed,
        temperature=temperature,
        samples=samples,
        loop_repeats=loop_repeats,
        loop_span=loop_span,
        device=device,
        dtype="stored" if dtype == "stored" else "float32",
    )
    report = measure_stability(merged, parents, texts, settings, tell=lambda what: click.echo(what, err=True))
    print_json(report.to_dict()) if as_json else print_report(report)


def check_device(device: str) -> None:
    """Refuse a device that is not there."""
    import re

    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device is {device!r}: expected cpu, cuda or cuda:0 and so on")
    if device != "cpu":
        import torch

        wanted = int(device.partition(":")[2] or 0)
        if wanted >= (count := torch.cuda.device_count()):
            raise UsageError(f"--device is {device}, but there are {count} CUDA devices here: take cpu")


def print_report(report: StabilityReport) -> None:
    """Print two tables on stdout."""
    from mergepipe.cli.inspect import print_table

    n = report.settings.n
    click.echo(f"what each writes after {report.prompts} prompts, up to {report.settings.tokens} tokens each")
    head = ("model", "decoding", "written", "repeated", "loops", f"distinct-{n}", "entropy", "tokens' entropy")
    rows = [
        (
            f"{model.path} ({model.role})",
            name,
            str(writing.tokens),
            _share(writing.repeated),
            _share(writing.loops),
            _share(writing.distinct[n]),
            _nats(writing.entropy),
            _nats(writing.token_entropy),
        )
        for model in report.models
        for name, writing in model.writings.items()
    ]
    print_table(head, rows)
    click.echo("\ndivergence in nats: of next-token distributions over each text, of softmaxed rows of the weights")
    print_table(
        ("parent", "over", "KL(merged || parent)", "KL(parent || merged)", "positions"),
        [row for pair in report.pairs for row in _pair_rows(pair)],
    )
    for pair in report.pairs:
        if pair.refused is not None:
            click.echo(f"{pair.parent}: no divergence of outputs: {pair.refused}")
        elif pair.shared_tokens is not None:
            worst = max(text.left_out for text in pair.texts)
            click.echo(
                f"{pair.parent}: another vocabulary; distributions are over the {pair.shared_tokens} tokens that both "
                f"have, which leaves out {_share(worst)} of probability"
            )


def _pair_rows(pair: PairReport) -> list[tuple[str, ...]]:
    rows = [
        (
            pair.parent,
            text.text,
            _nats(text.merged_to_parent),
            _nats(text.parent_to_merged),
            " / ".join(map(str, dict.fromkeys(text.positions))),
        )
        for text in pair.texts
    ]
    weights = pair.weights
    return [*rows, (pair.parent, "weights", _small(weights.forward), _small(weights.backward), f"{weights.rows} rows")]


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{100 * value:.1f} %"


def _nats(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _small(value: float) -> str:
    return f"{value:.3e}"
