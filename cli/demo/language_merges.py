"""The pair that writes, merged: what it knows of each expert's text, how stable it writes, what the proxy is worth.

Each merge is judged twice: by the surprise (nats per character) at held-out text of each expert, and by what `mergepipe
stability` measures beside both experts. Then the proxy is put to the test: whether the divergence of softmaxed weight
rows ranks models, and tensors, as the divergence of their outputs does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

import mergepipe
from mergepipe.cli.demo.language import Pair, load, surprise
from mergepipe.pipeline.generation import LanguageModel
from mergepipe.pipeline.row_divergence import mean_row_divergence, row_divergences
from mergepipe.pipeline.stability import rank_correlation
from mergepipe.pipeline.stability_report import Settings, Writing, compare_outputs, measure_stability
from mergepipe.storage.checkpoint import open_checkpoint

SETTINGS = Settings(tokens=96, n=6, loop_span=18)
"""Six characters are about a word: shorter runs repeat in any text."""


@dataclass(frozen=True, slots=True)
class LanguageRow:
    """A line of the table: a model of the pair, or a merge.

    Attributes
    ----------
    name : str
    surprises : tuple of float
        Nats per character of held-out text of each expert, in its own tokens.
    writings : mapping of str to Writing
        What it writes ``greedy`` and by ``sampling``.
    divergences : tuple of (float, float), or None
        For each expert KL(this || expert) and KL(expert || this) over the prompts; None for the base and the experts.
    """

    name: str
    kind: str
    surprises: tuple[float, ...]
    writings: Mapping[str, Writing]
    divergences: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Proxy:
    """What the row divergence of weights has to do with the divergence of outputs.

    Attributes
    ----------
    merges : float or None
        Spearman's rank correlation over `n_merges` pairs of a merge and an expert.
    tensors : float or None
        The same over `n_tensors` cases of one expert with one tensor of the other one.
    """

    merges: float | None
    n_merges: int
    tensors: float | None
    n_tensors: int


@dataclass(frozen=True, slots=True)
class LanguageReport:
    """What came out for the pair."""

    experts: tuple[str, ...]
    rows: tuple[LanguageRow, ...]
    proxy: Proxy
    swap_differs: bool


def recipes(pair: Pair) -> dict[str, dict[str, Any]]:
    """All merges of the table, by the names they have in it."""
    first, second = (str(path) for path in pair.experts.values())
    one, other = pair.experts
    both = [{"model": path, "parameters": {"weight": 1.0}} for path in (first, second)]
    found: dict[str, dict[str, Any]] = {
        "linear": {"merge_method": "linear", "models": both},
        "slerp": {
            "merge_method": "slerp",
            "base_model": first,
            "models": [{"model": second}],
            "parameters": {"t": 0.5},
        },
        "task_arithmetic": {"merge_method": "task_arithmetic", "base_model": str(pair.base), "models": both},
        "ties": {
            "merge_method": "ties",
            "base_model": str(pair.base),
            "models": both,
            "parameters": {"density": 0.2},
        },
    }
    for quantile in (0.9, 0.5):
        for name, primary, donor in ((one, first, second), (other, second, first)):
            found[f"scf_rkl on {name}, {quantile:g}"] = {
                "merge_method": "scf_rkl",
                "base_model": primary,
                "models": [{"model": donor}],
                "parameters": {"quantile": quantile},
            }
    return found


def merge(folder: Path, name: str, recipe: Mapping[str, Any]) -> Path:
    """Write `recipe`, build and run it; the merged folder."""
    slug = "-".join(name.replace(",", "").split())
    path = folder / "recipes" / f"{slug}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
    mergepipe.build(path, work=folder / "work" / slug, out=folder / "merged" / slug)
    return mergepipe.run(folder / "work" / slug).output


def merge_pair(
    pair: Pair, folder: Path, *, tell: Callable[[str], None], settings: Settings = SETTINGS
) -> LanguageReport:
    """Merge the pair in several ways and judge what comes out.

    Parameters
    ----------
    pair : Pair
    folder : Path
        Gets `recipes`, `work` and `merged`.
    tell : callable
        Told the name of each merge once it is judged.
    settings : Settings
        Of the stability.
    """
    merged = {name: merge(folder, name, recipe) for name, recipe in recipes(pair).items()}
    rows: list[LanguageRow] = []
    for name, path in merged.items():
        report = measure_stability(path, list(pair.experts.values()), pair.prompts, settings)
        if not rows:
            # The experts write the same beside every merge; the base is measured against itself.
            base = measure_stability(pair.base, [pair.base], pair.prompts, settings)
            rows.append(LanguageRow("base", "base", _surprises(pair, pair.base), base.models[0].writings))
            for expert, found in zip(pair.experts, report.models[1:], strict=True):
                own = _surprises(pair, pair.experts[expert])
                rows.append(LanguageRow(f"expert {expert}", "expert", own, found.writings))
        divergences = tuple(
            (text.merged_to_parent or 0.0, text.parent_to_merged or 0.0)
            for text in (compared.texts[0] for compared in report.pairs)
        )
        rows.append(LanguageRow(name, "merge", _surprises(pair, path), report.models[0].writings, divergences))
        tell(f"merged by {name}")
    proxy = judge_proxy(pair, list(merged.values()))
    tell("put the proxy to the test")
    swapped = [merged[f"scf_rkl on {name}, 0.9"] for name in pair.experts]
    return LanguageReport(tuple(pair.experts), tuple(rows), proxy, len({_digest(path) for path in swapped}) > 1)


def _surprises(pair: Pair, folder: Path) -> tuple[float, ...]:
    model = load(folder)
    with torch.inference_mode():
        return tuple(float(surprise(model, torch.from_numpy(text))) for text in pair.held_out.values())


def _digest(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def judge_proxy(pair: Pair, merged: Sequence[Path]) -> Proxy:
    """Rank correlations between the row divergence of weights and the divergence of outputs, over the prompts.

    Both as SCF-RKL takes them, KL(candidate || primary). Over merges: every merge as the candidate, each expert as the
    primary. Over tensors: an expert with one tensor of the other one as the candidate, itself as the primary.
    """
    experts = [LanguageModel(path) for path in pair.experts.values()]
    texts = [(ids[:1], ids[1:]) for ids in map(experts[0].encode, pair.prompts)]
    weights, outputs = [], []
    for path in merged:
        candidate = LanguageModel(path)
        for expert in experts:
            measured = mean_row_divergence(open_checkpoint(path), open_checkpoint(expert.folder))
            weights.append(measured.forward)
            outputs.append(float(compare_outputs(candidate, expert, texts)[0][0]))
    over_merges = rank_correlation(weights, outputs)
    n_merges = len(weights)
    weights, outputs = [], []
    for primary, donor in (experts, experts[::-1]):
        candidate = LanguageModel(primary.folder)
        theirs = donor.model.state_dict()
        for tensor in row_divergences(open_checkpoint(donor.folder), open_checkpoint(primary.folder)):
            own = candidate.model.state_dict()[tensor.name]
            kept = own.clone()
            own.copy_(theirs[tensor.name])
            weights.append(tensor.forward)
            outputs.append(float(compare_outputs(candidate, primary, texts)[0][0]))
            own.copy_(kept)
    return Proxy(over_merges, n_merges, rank_correlation(weights, outputs), len(weights))
