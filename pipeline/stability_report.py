"""A merged language model beside its parents: what each writes, and how far their next-token distributions diverge.

Every model writes on its own, greedily and by drawing. Then the merged model and one parent after the other read the
same texts, and the divergence of their distributions is taken in both directions over three kinds of texts: the prompts
(the same for every merge, so that merges can be compared), and what either wrote greedily and by drawing: KL(merged ||
parent) over what the merged model wrote, KL(parent || merged) over what the parent wrote, each an expectation under the
model that stands in front. Two models are held in memory at a time, never more.

Models may differ in vocabulary. What they write is measured in tokens of their own. Divergences need texts that are the
same tokens for both: if a parent cuts a prompt into other tokens than the merged model does, no divergence is reported,
and the reason is. If it does not, but the vocabularies differ all the same (added tokens, padding), the distributions
are those over the tokens that both have, and the probability left out is reported; a continuation is read up to its
first token that only one of them has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mergepipe.pipeline.generation import Continuation, Decoding, LanguageModel
from mergepipe.pipeline.row_divergence import RowDivergence, mean_row_divergence
from mergepipe.pipeline.stability import (
    distinct_rate,
    divergences,
    log_softmax,
    loop_rate,
    repeated_rate,
    token_entropy,
)
from mergepipe.storage.checkpoint import open_checkpoint

ROWS = 32
"""Distributions worked on in float64 at a time: a vocabulary may be 200,000 wide."""

Writings = Mapping[str, Sequence[Continuation]]


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, and how.

    Attributes
    ----------
    tokens : int
        Most tokens of a continuation.
    n : int
        Length of the n-grams.
    seed : int
        Of the drawn continuations.
    temperature : float
        Of the drawn continuations, above 0.
    samples : int
        Drawn continuations of each prompt.
    loop_repeats, loop_span : int
        What a loop is, see :func:`~mergepipe.pipeline.stability.has_loop`.
    device : str
    dtype : {'float32', 'stored'}
    """

    tokens: int = 128
    n: int = 4
    seed: int = 0
    temperature: float = 1.0
    samples: int = 1
    loop_repeats: int = 3
    loop_span: int = 16
    device: str = "cpu"
    dtype: Literal["float32", "stored"] = "float32"

    @property
    def decodings(self) -> dict[str, Decoding]:
        """By the name that the report calls them."""
        drawn = Decoding(self.tokens, self.temperature, self.samples, self.seed)
        return {"greedy": Decoding(self.tokens), "sampling": drawn}


@dataclass(frozen=True, slots=True)
class Writing:
    """Statistics of what one model wrote in one way, as :mod:`~mergepipe.pipeline.stability` defines them."""

    continuations: int
    tokens: int
    repeated: float | None
    loops: float
    distinct: dict[int, float | None]
    entropy: float | None
    token_entropy: float | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model: the statistics of what it wrote greedily and by drawing."""

    path: str
    role: Literal["merged", "parent"]
    writings: dict[str, Writing]


@dataclass(frozen=True, slots=True)
class TextDivergence:
    """Divergence over one kind of text, in nats per token; None where there is no position, or it is infinite.

    Attributes
    ----------
    text : {'prompts', 'greedy', 'sampling'}
    merged_to_parent : float or None
        Mean of KL(merged || parent) over the prompts, or over what the merged model wrote.
    parent_to_merged : float or None
        Mean of KL(parent || merged) over the prompts, or over what the parent wrote.
    positions : tuple of int
        How many distributions each is the mean of.
    left_out : float
        Mean probability that either model gives to tokens that only one of them has.
    """

    text: str
    merged_to_parent: float | None
    parent_to_merged: float | None
    positions: tuple[int, int]
    left_out: float


@dataclass(frozen=True, slots=True)
class PairReport:
    """The merged model and one parent.

    Attributes
    ----------
    parent : str
    shared_tokens : int or None
        Tokens over which distributions are compared; None if those are all tokens of both.
    refused : str or None
        Why no divergence of outputs is reported.
    texts : tuple of TextDivergence
    weights : RowDivergence
        Mean divergence of the softmaxed rows of their weights, the proxy; ``forward`` is KL(merged || parent).
    """

    parent: str
    shared_tokens: int | None
    refused: str | None
    texts: tuple[TextDivergence, ...]
    weights: RowDivergence


@dataclass(frozen=True, slots=True)
class StabilityReport:
    """What :func:`measure_stability` found."""

    prompts: int
    settings: Settings
    models: tuple[ModelReport, ...]
    pairs: tuple[PairReport, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As plain values, as ``--json`` prints them."""
        models = [
            {"path": m.path, "role": m.role, **{name: asdict(w) for name, w in m.writings.items()}} for m in self.models
        ]
        return {
            "prompts": self.prompts,
            "settings": asdict(self.settings),
            "models": models,
            "divergences": [_pair_to_dict(pair) for pair in self.pairs],
        }


def _pair_to_dict(pair: PairReport) -> dict[str, Any]:
    weights = {
        "merged_to_parent": pair.weights.forward,
        "parent_to_merged": pair.weights.backward,
        "rows": pair.weights.rows,
    }
    return {**asdict(pair), "weights": weights}


def measure_stability(
    merged: str | Path,
    parents: Sequence[str | Path],
    prompts: Sequence[str],
    settings: Settings | None = None,
    tell: Callable[[str], None] = lambda what: None,
) -> StabilityReport:
    """Let a merged model and its parents write, and compare their next-token distributions.

    Parameters
    ----------
    merged : path
        A folder with a causal language model, its safetensors and its tokenizer.
    parents : sequence of path
        The same, one or more.
    prompts : sequence of str
    settings : Settings, optional
    tell : callable
        Told what is being done.

    Returns
    -------
    StabilityReport
        A function of the arguments and of the files, on one type of machine with one number of threads.

    Raises
    ------
    CheckpointError
        If a folder holds no such model.
    UsageError
        If a prompt is too long for a model.
    """
    given = settings or Settings()
    for folder in (merged, *parents):
        open_checkpoint(folder)  # so that a wrong name is found before an hour has gone into the others
    tell(f"{merged} writes")
    model = LanguageModel(merged, device=given.device, dtype=given.dtype)
    written = _write(model, prompts, given)
    models, pairs = [_report(merged, "merged", written, given)], []
    for folder in parents:
        tell(f"{folder} writes")
        parent = LanguageModel(folder, device=given.device, dtype=given.dtype)
        theirs = _write(parent, prompts, given)
        models.append(_report(folder, "parent", theirs, given))
        tell(f"{merged} and {folder} read the same texts")
        pairs.append(_compare(model, written, parent, theirs, prompts))
    return StabilityReport(len(prompts), given, tuple(models), tuple(pairs))


def _write(model: LanguageModel, prompts: Sequence[str], settings: Settings) -> Writings:
    encoded = [model.encode(prompt) for prompt in prompts]
    model.check_length(encoded, settings.tokens)
    return {name: model.write(encoded, decoding) for name, decoding in settings.decodings.items()}


def _report(
    folder: str | Path, role: Literal["merged", "parent"], written: Writings, settings: Settings
) -> ModelReport:
    return ModelReport(str(folder), role, {name: summarize(found, settings) for name, found in written.items()})


def summarize(continuations: Sequence[Continuation], settings: Settings) -> Writing:
    """Statistics of continuations."""
    tokens = [continuation.tokens for continuation in continuations]
    spread = [value for continuation in continuations for value in continuation.entropies]
    return Writing(
        continuations=len(tokens),
        tokens=sum(map(len, tokens)),
        repeated=repeated_rate(tokens, settings.n),
        loops=loop_rate(tokens, settings.loop_repeats, settings.loop_span),
        distinct={n: distinct_rate(tokens, n) for n in range(1, settings.n + 1)},
        entropy=sum(spread) / len(spread) if spread else None,
        token_entropy=token_entropy(tokens),
    )


class SharedTokens:
    """The tokens that two models have in common, by the ids of each.

    Attributes
    ----------
    columns : tuple of int64 ndarray, or None
        Ids of the shared tokens in the first and in the second model, in one order; None if both have the same tokens
        under the same ids, and as many logits.
    """

    def __init__(self, first: LanguageModel, second: LanguageModel) -> None:
        self.columns: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None
        self._there: dict[int, int] = {}
        if first.ids != second.ids or first.width != second.width:
            self._there = {number: second.ids[name] for name, number in first.ids.items() if name in second.ids}
            order = sorted(self._there)
            self.columns = (np.array(order, np.int64), np.array([self._there[number] for number in order], np.int64))

    def translate(self, tokens: Sequence[int]) -> list[int]:
        """The first model's `tokens` as the second's, up to the first that only the first model has."""
        if self.columns is None:
            return list(tokens)
        found: list[int] = []
        for token in tokens:
            if token not in self._there:
                break
            found.append(self._there[token])
        return found


def compare_outputs(
    first: LanguageModel, second: LanguageModel, texts: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> tuple[npt.NDArray[np.float64], int]:
    """Divergence of two models' next-token distributions over texts, in both directions.

    Parameters
    ----------
    first, second : LanguageModel
    texts : sequence of pairs of token ids
        Of the first model: what stands before, one token or more that the second model has, too; and what follows it.
        There is a position before every token that follows.

    Returns
    -------
    sums : float64 ndarray, shape (3,)
        Of KL(first || second), of KL(second || first) and of the larger probability left out, over all positions.
    positions : int
    """
    shared = SharedTokens(first, second)
    sums, positions = np.zeros(3), 0
    for before, after in texts:
        following = shared.translate(after)
        if not following:
            continue
        seen = [*before, *after[: len(following) - 1]]
        p, q = first.read(seen, len(before)), second.read(shared.translate(seen), len(before))
        for start in range(0, len(following), ROWS):
            rows = slice(start, start + ROWS)
            sums += _both_ways(p[rows], q[rows], shared)
        positions += len(following)
    return sums, positions


def _both_ways(p: npt.NDArray[Any], q: npt.NDArray[Any], shared: SharedTokens) -> npt.NDArray[np.float64]:
    left_out = 0.0
    if shared.columns is not None:
        kept = [logits[:, columns] for logits, columns in zip((p, q), shared.columns, strict=True)]
        shares = [
            np.exp(log_softmax(logits)[:, columns]).sum(axis=-1)
            for logits, columns in zip((p, q), shared.columns, strict=True)
        ]
        left_out = float(np.maximum(1 - np.minimum(*shares), 0.0).sum())
        p, q = kept
    return np.array([divergences(p, q).sum(), divergences(q, p).sum(), left_out])


def _compare(
    merged: LanguageModel, written: Writings, parent: LanguageModel, theirs: Writings, prompts: Sequence[str]
) -> PairReport:
    weights = mean_row_divergence(open_checkpoint(merged.folder), open_checkpoint(parent.folder))
    shared = SharedTokens(merged, parent)
    number = None if shared.columns is None else len(shared.columns[0])
    refused = _why_not(merged, parent, prompts)
    if refused is not None:
        return PairReport(str(parent.folder), number, refused, (), weights)
    given = [merged.encode(prompt) for prompt in prompts]
    texts = [_over_prompts(merged, parent, given)]
    texts += [_over_writings(merged, parent, name, written[name], theirs[name]) for name in written]
    return PairReport(str(parent.folder), number, None, tuple(texts), weights)


def _why_not(merged: LanguageModel, parent: LanguageModel, prompts: Sequence[str]) -> str | None:
    """Why outputs can't be compared; None if they can."""
    for number, prompt in enumerate(prompts, 1):
        ours, theirs = ([m.names.get(i) for i in m.encode(prompt)] for m in (merged, parent))
        if ours != theirs:
            return (
                f"prompt {number} is {len(ours)} tokens for the merged model and {len(theirs)} other ones for this one"
            )
    return None


def mean_of(total: float, positions: int) -> float | None:
    """A mean over positions; None over none, and where one model rules out what the other does not.

    Examples
    --------
    >>> mean_of(3.0, 2), mean_of(0.0, 0), mean_of(float("inf"), 2)
    (1.5, None, None)
    """
    return float(total) / positions if positions and math.isfinite(total) else None


def _over_prompts(merged: LanguageModel, parent: LanguageModel, given: Sequence[tuple[int, ...]]) -> TextDivergence:
    """At every place of a prompt that has a token before it, that after the last token left out."""
    sums, positions = compare_outputs(merged, parent, [(ids[:1], ids[1:]) for ids in given])
    ours, theirs, left_out = (mean_of(value, positions) for value in sums)
    return TextDivergence("prompts", ours, theirs, (positions, positions), left_out or 0.0)


def _over_writings(
    merged: LanguageModel,
    parent: LanguageModel,
    name: str,
    ours: Sequence[Continuation],
    theirs: Sequence[Continuation],
) -> TextDivergence:
    """Each direction over what the model in front of it wrote."""
    first, one = compare_outputs(merged, parent, [(c.prompt, c.tokens) for c in ours])
    second, other = compare_outputs(parent, merged, [(c.prompt, c.tokens) for c in theirs])
    left_out = mean_of(first[2] + second[2], one + other) or 0.0
    return TextDivergence(name, mean_of(first[0], one), mean_of(second[0], other), (one, other), left_out)
