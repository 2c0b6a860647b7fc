"""Whole-matrix methods over arrays in memory, and references that share no code with them: numpy and whole SVDs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mergepipe.tasks.method import Job, MergeMethod, State, Tile
from mergepipe.tasks.subspace.panels import Made, Sources
from support.drive import make_job

Matrix = np.ndarray[Any, np.dtype[np.float64]]


DEVICE = "cpu"
"""Where :func:`solve` works; the fixture `device` sets it."""


def random_deltas(rows: int, columns: int, models: int, seed: int = 0, rank: int | None = None) -> list[Matrix]:
    """Task vectors with a part that all share and a falling spectrum; of low rank if asked for."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((rows, columns)) * 0.3
    side = rank or min(rows, columns)
    deltas = []
    for _ in range(models):
        left, right = rng.standard_normal((rows, side)), rng.standard_normal((side, columns))
        deltas.append((left / np.sqrt(1 + np.arange(side))) @ right / np.sqrt(side) + (shared if rank is None else 0))
    return deltas


def solve(
    name: str,
    deltas: Sequence[Matrix],
    params: Mapping[str, Any] | None = None,
    *,
    tensor: str = "layer.weight",
    device: str | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[Matrix, State]:
    """The update that a method makes of task vectors, and what it found out; on `DEVICE` unless one is named."""
    device = device or DEVICE
    shape = (deltas[0].shape[0], deltas[0].shape[1])
    method, job = make_job(name, shape, np.float64, each or [{} for _ in deltas], params, tensor=tensor)
    matrix = method.whole(job)
    assert matrix is not None
    held = [torch.from_numpy(np.ascontiguousarray(delta)) for delta in deltas]

    def panels(whole: torch.Tensor) -> Made:
        return Made(shape, lambda span: whole[span[0] : span[1]].to(device, copy=True))

    taus = tuple(panels(whole) for whole in held)
    solver = matrix.start(job, Sources(taus, taus, merged=_merged(method, job, held)), device)
    for number in range(len(matrix.steps(job))):
        solver.step(number)
    update = np.zeros(shape)
    solver.add_update((0, shape[0]), update)
    return update, solver.findings()


def _merged(method: MergeMethod, job: Job, deltas: Sequence[torch.Tensor]) -> Made | None:
    """What the kernel makes of the task vectors."""
    if not (method.matrix is not None and method.matrix.merges):
        return None
    stack = np.stack([delta.numpy().reshape(-1) for delta in deltas])
    out = np.empty(stack.shape[1])
    scratch = np.empty((method.scratch_rows, stack.shape[1]))
    plain = replace(job, params={**job.params, "lambda": 1.0})
    method.kernel(plain, {}, Tile(0, 0, np.zeros(stack.shape[1]), stack, scratch), out)
    whole = torch.from_numpy(out.reshape(job.shape))
    return Made((job.shape[0], job.shape[1]), lambda span: whole[span[0] : span[1]].clone())


def polar(x: Matrix) -> Matrix:
    left, _, right = np.linalg.svd(x, full_matrices=False)
    return left @ right


def simplex(x: Matrix) -> Matrix:
    """The simplex frame nearest to the columns of x."""
    count = x.shape[1]
    left, values, right = np.linalg.svd(x @ (np.eye(count) - 1 / count), full_matrices=False)
    kept = values > 1e-10 * values[0]
    frame: Matrix = np.sqrt(count / (count - 1)) * left[:, kept] @ right[kept]
    return frame if count > 1 else x


def components(deltas: Sequence[Matrix], rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """Leading singular vectors side by side, the largest element of each left one positive."""
    parts = [np.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = np.concatenate([u[:, :rank] for u, _, _ in parts], 1)
    right = np.concatenate([v[:rank].T for _, _, v in parts], 1)
    signs = np.sign(left[np.abs(left).argmax(0), np.arange(left.shape[1])])
    return left * signs, np.concatenate([s[:rank] for _, s, _ in parts]), right * signs


def auto_rank(deltas: Sequence[Matrix]) -> int:
    return max(1, min(deltas[0].shape) // len(deltas))


def mda(deltas: Sequence[Matrix], mode: str = "etf", rank: int | None = None, right_align: str = "polar") -> Matrix:
    left, values, right = components(deltas, rank or auto_rank(deltas))
    if mode == "projection":
        frame = simplex(left) * np.sqrt((len(values) - 1) / len(values))
        result: Matrix = frame @ frame.T @ (left * values) @ right.T
        return result
    aligned = {"polar": polar, "etf": simplex, "none": lambda x: x}
    merged: Matrix = (simplex(left) if mode == "etf" else polar(left)) * values @ aligned[right_align](right).T
    return merged


def tsv_m(deltas: Sequence[Matrix]) -> Matrix:
    """As the method is published: the components of all tasks side by side, then two more SVDs."""
    rank = auto_rank(deltas)
    lefts, values = np.zeros((deltas[0].shape[0], rank * len(deltas))), np.zeros(rank * len(deltas))
    rights = np.zeros((rank * len(deltas), deltas[0].shape[1]))
    for t, delta in enumerate(deltas):
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        part = slice(t * rank, (t + 1) * rank)
        lefts[:, part], values[part], rights[part] = u[:, :rank], s[:rank], v[:rank]
    u_u, _, v_u = np.linalg.svd(lefts, full_matrices=False)
    u_v, _, v_v = np.linalg.svd(rights, full_matrices=False)
    return np.linalg.multi_dot((u_u, v_u, np.diag(values), u_v, v_v))


def iso_c(deltas: Sequence[Matrix]) -> Matrix:
    left, values, right = np.linalg.svd(np.sum(deltas, 0), full_matrices=False)
    result: Matrix = left @ right * values.mean()
    return result


def iso_cts(deltas: Sequence[Matrix], fraction: float = 0.8) -> Matrix:
    side, count = min(deltas[0].shape), len(deltas)
    each = round((side - int(fraction * side)) / count)
    common = side - each * count
    u, s, v = np.linalg.svd(np.sum(deltas, 0), full_matrices=False)
    u, s, v = u[:, :common], s[:common], v[:common]
    lefts, values, rights = [], [], []
    for delta in deltas:
        a, b, c = np.linalg.svd(delta - u @ (u.T @ delta), full_matrices=False)
        lefts.append(a[:, :each])
        values.append(b[:each])
        rights.append(c[:each])
    left, right = np.concatenate([*lefts, u], 1), np.concatenate([*rights, v], 0)
    result: Matrix = polar(left) @ polar(right) * np.concatenate([*values, s]).mean()
    return result


def dc_merge(deltas: Sequence[Matrix], share: float = 0.001) -> Matrix:
    rank, side = auto_rank(deltas), min(deltas[0].shape)
    left, _, right = components(deltas, rank)
    cover, across = (np.pad(polar(x), ((0, 0), (0, side - x.shape[1]))) for x in (left, right))
    kept = max(1, int(share * side * side))
    masked = []
    for delta in deltas:
        u, s, v = np.linalg.svd(delta, full_matrices=False)
        inside = cover.T @ ((u[:, :rank] * s[:rank]) @ v[:rank]) @ across
        least = np.sort(np.abs(inside).reshape(-1))[-kept]
        masked.append(np.where(np.abs(inside) >= least, inside, 0))
    stack = np.stack(masked)
    sign = np.sign(stack.sum(0))
    agree = np.sign(stack) == sign
    mean = np.where(sign == 0, 0, (stack * agree).sum(0) / np.maximum(agree.sum(0), 1))
    place = np.arange(side) // (side // len(deltas))
    mean = np.where((place[:, None] == place) & (place < len(deltas))[:, None], mean, 0)
    result: Matrix = cover @ mean @ across.T
    return result


def svc(update: Matrix, deltas: Sequence[Matrix], alpha: float) -> Matrix:
    left, values, right = np.linalg.svd(update, full_matrices=False)
    scales = []
    for r in range(len(values)):
        whole = left[:, r] @ update
        parts = [left[:, r] @ delta for delta in deltas]
        scales.append(len(deltas) / sum(max(alpha, float(whole @ part / (part @ part))) for part in parts))
    result: Matrix = (left * values * scales) @ right
    return result


def opcm(deltas: Sequence[Matrix], alpha: float = 0.5) -> Matrix:
    """As it is published, with all of U and V, for one tensor and without the scaling."""
    merged = deltas[0].copy()
    for delta in deltas[1:]:
        if delta.ndim != 2:
            merged = merged + delta
            continue
        left, values, right = np.linalg.svd(merged, full_matrices=True)
        inside = left.T @ delta @ right.T
        rank = int((np.cumsum(values) / values.sum() > alpha).argmax())
        np.fill_diagonal(inside, 0)
        inside[:rank, :rank] = 0
        merged = merged + left @ inside @ right
    return merged


def opcm_model(
    base: Mapping[str, Matrix],
    experts: Sequence[Mapping[str, Matrix]],
    alpha: float = 0.5,
    lam: float = 1.0,
    exclude: Sequence[str] = ("embed_tokens", "lm_head"),
) -> dict[str, Matrix]:
    """The whole model, scaled after each step as published: the norm of the merge is the mean norm so far."""
    taus = [{name: expert[name] - below for name, below in base.items()} for expert in experts]

    def norm(update: Mapping[str, Matrix]) -> float:
        return float(np.sqrt(sum((part**2).sum() for part in update.values())))

    merged, before = taus[0], 1.0
    for t in range(1, len(taus)):
        step = {}
        for name, tau in taus[t].items():
            plain = tau.ndim != 2 or tau.size == 0 or any(word in name for word in exclude)
            clean = tau if plain else opcm([merged[name], tau], alpha) - merged[name]
            step[name] = before * merged[name] + clean
        wanted = float(np.mean([norm(tau) for tau in taus[: t + 1]]))
        before = norm(step) / wanted
        merged = {name: part / before for name, part in step.items()}
    return {name: below + lam * merged[name] for name, below in base.items()}
