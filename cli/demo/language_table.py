"""The table of the pair that writes, and what it says in words."""

from __future__ import annotations

from rich.table import Table

from mergepipe.cli.demo.language_merges import SETTINGS, LanguageReport, LanguageRow
from mergepipe.cli.demo.table import percent

LEGEND = (
    "surprise: nats per character of held-out text of each expert's kind; less is better. repeated, loops, entropy and",
    "KL are what `mergepipe stability` measures: KL(merge || expert) and KL(expert || merge) over the prompts.",
    "scf_rkl on NAME, Q: NAME is the primary, whose tokens and chat template the merge has; Q is the quantile.",
)


def make_table(report: LanguageReport) -> Table:
    """Surprise, stability and divergence; the merge with the least surprise in bold."""
    best = best_merge(report)
    table = Table(
        title="Models that write: a pair with other added tokens (Llama, bfloat16, character by character)",
        title_justify="left",
        box=None,
        header_style="dim",
    )
    table.add_column("", no_wrap=True)
    for name in report.experts:
        table.add_column(f"surprise\n{name}", justify="right")
    for how in ("greedy", "sampled"):
        table.add_column(f"repeated\n{how}", justify="right")
        table.add_column(f"loops\n{how}", justify="right")
    table.add_column("entropy\nsampled", justify="right")
    for name in report.experts:
        table.add_column(f"KL to/from\n{name}", justify="right")
    kind = report.rows[0].kind
    for row in report.rows:
        if row.kind != kind:
            table.add_row()
        kind = row.kind
        table.add_row(row.name, *_cells(row, len(report.experts)), style="bold" if row is best else "")
    return table


def _cells(row: LanguageRow, n_experts: int) -> list[str]:
    greedy, sampled = row.writings["greedy"], row.writings["sampling"]
    divergences = row.divergences or ()
    return [
        *[f"{value:.3f}" for value in row.surprises],
        percent(greedy.repeated),
        percent(greedy.loops),
        percent(sampled.repeated),
        percent(sampled.loops),
        "n/a" if sampled.entropy is None else f"{sampled.entropy:.3f}",
        *[f"{forward:.3f} {backward:.3f}" for forward, backward in divergences],
        *[""] * (n_experts - len(divergences)),
    ]


def best_merge(report: LanguageReport) -> LanguageRow:
    """The merge with the least mean surprise; the first of several."""
    return min((row for row in report.rows if row.kind == "merge"), key=lambda row: sum(row.surprises))


def remarks(report: LanguageReport) -> list[str]:
    """What the table says, in words."""
    merges = [row for row in report.rows if row.kind == "merge"]
    best = best_merge(report)
    base = sum(report.rows[0].surprises) / len(report.experts)
    lowest = min(merges, key=lambda row: row.writings["greedy"].repeated or 0.0)
    proxy = report.proxy
    swap = "other weights" if report.swap_differs else "THE SAME WEIGHTS"
    mean = sum(best.surprises) / len(report.experts)
    correlations = f"{_correlation(proxy.merges)} over {proxy.n_merges} pairs of a merge and an expert, "
    correlations += f"{_correlation(proxy.tensors)} over {proxy.n_tensors} swaps of one tensor"
    rate = percent(lowest.writings["greedy"].repeated)
    return [
        f"Least mean surprise of a merge: {best.name}, {mean:.3f} nats per character; the base has {base:.3f}.",
        f"Least repeated {SETTINGS.n}-grams of greedy writing: {lowest.name}, {rate} %.",
        f"Swapping the primary of scf_rkl gives {swap}.",
        f"Row KL of softmaxed weights against output KL, Spearman's rank correlation: {correlations}.",
    ]


def _correlation(value: float | None) -> str:
    return "n/a" if value is None else f"{value:+.2f}"
