"""A LoRA adapter from a base and a fine-tune of it: each changed matrix as the best pair of a given rank.

    headers ─► form of each tensor, memory ─► factor, one tensor after another ─► adapter_model.safetensors

Each tensor's pair is kept in a folder inside the output as soon as it is found, so that an interrupted extraction goes
on where it ended when the same command is given again. The adapter's weights file gets its name last of all.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from math import sqrt
from pathlib import Path

import numpy as np

from mergepipe.errors import CheckpointError, MemoryBudgetError, TensorMismatchError, UsageError
from mergepipe.pipeline import devices, outputs
from mergepipe.pipeline.admission import Admission
from mergepipe.pipeline.deltas import WINDOW_BYTES, Deltas
from mergepipe.pipeline.drive import Drivers
from mergepipe.pipeline.events import Announcer, Listener, Note, RunStarted, TensorFinished, UnitFinished
from mergepipe.pipeline.lora import ADAPTER_CONFIG, ADAPTER_NAME, PREFIX, Part, adapter_config, parts_of, targets
from mergepipe.pipeline.machine import available_bytes, cpu_count
from mergepipe.pipeline.memory import DEFAULT_ALLOWED, MIB, RESERVED_BYTES, TORCH_BYTES, parse_bytes
from mergepipe.pipeline.models import InputModel, open_models
from mergepipe.pipeline.module_names import module_names
from mergepipe.pipeline.names import is_buffer
from mergepipe.pipeline.patterns import compile_pattern
from mergepipe.pipeline.references import is_hub_id, parse_reference
from mergepipe.pipeline.side_files import to_json
from mergepipe.pipeline.space import Need, check_room
from mergepipe.pipeline.spool import Kept, Spool, Wanted
from mergepipe.pipeline.weights import reading_bytes
from mergepipe.storage.atomic import write_atomic
from mergepipe.storage.checkpoint import Checkpoint
from mergepipe.storage.dtypes import DTYPES, MERGED_ALIASES
from mergepipe.storage.file_errors import explained
from mergepipe.storage.layout import OutputTensor, lay_out
from mergepipe.storage.readers import MmapReader
from mergepipe.storage.workspace import Workspace, WorkspaceLock
from mergepipe.storage.writer import ShardWriter
from mergepipe.tasks import philox
from mergepipe.tasks.convert import encode
from mergepipe.tasks.method import Array
from mergepipe.tasks.subspace.factor import factorize
from mergepipe.tasks.subspace.panels import panel_floats
from mergepipe.tasks.subspace.route import Route, factor_floats, factor_route
from mergepipe.tasks.subspace.solver import HELD_PANELS


@dataclass(frozen=True, slots=True)
class Extracted:
    """An adapter that was made.

    Attributes
    ----------
    output : Path
    ranks : dict of str to int
        Of each module that has a pair.
    energies : dict of str to float
        For each of these, the share of the update's squared norm that its pair holds.
    energy : float
        The same over all of them.
    whole : tuple of str
        Names of tensors that are saved as they are.
    left_out : tuple of str
        Names of tensors that the fine-tune changed and the adapter does not hold.
    unchanged : int
        Tensors that are equal in both models.
    """

    output: Path
    ranks: dict[str, int]
    energies: dict[str, float]
    energy: float
    whole: tuple[str, ...]
    left_out: tuple[str, ...]
    unchanged: int


def extract_lora(
    base: str | Path,
    finetuned: str | Path,
    out: str | Path,
    wanted: Wanted,
    *,
    memory: str | int | None = None,
    workers: int | None = None,
    stop: threading.Event | None = None,
    on_event: Listener | None = None,
) -> Extracted:
    """Write the PEFT adapter that turns `base` into `finetuned`, as well as its rank allows.

    Parameters
    ----------
    base, finetuned : path or str
        Models of the same tensors, as a recipe names them: a folder, a file, a hub id, with an adapter or without.
    out : path
        The folder to write; must not exist, be empty, or hold unfinished work of the same extraction.
    wanted : Wanted
    memory : size, optional
        Ceiling of the process; half of the memory available by default.
    workers : int, optional
        Tensors worked on at once, as far as the ceiling allows; one per processor by default.
    stop : threading.Event, optional
        Set it to end the work; the tensors that are done are kept.
    on_event : callable, optional

    Returns
    -------
    Extracted

    Raises
    ------
    UsageError
        If the rank is none, or larger than every matrix; if a pattern is no regular expression.
    TensorMismatchError
        If the models do not have the same tensors.
    CheckpointError
        If they are equal, or differ in what no adapter can hold.
    InputChangedError
        If a file of theirs changes while it is read; what was found before is kept.
    MemoryBudgetError, DiskFullError, OutputExistsError
    Interrupted
        The same call goes on.
    """
    _check_wanted(wanted)
    announce = Announcer(on_event)
    opened = open_models([str(parse_reference(os.fspath(one), Path.cwd())) for one in (base, finetuned)], announce)
    for note in (note for model in opened for note in model.notes):
        announce(Note(note))
    parts = _choose(opened[0], opened[1], wanted)
    allowed = parse_bytes(memory) if memory is not None else max(DEFAULT_ALLOWED, available_bytes() // 2)
    sizes = {part.name: projected_bytes(part, wanted) + _held(opened, part) for part in parts}
    capacity = _capacity(sizes, allowed)
    job = Spool(opened[0], opened[1], Path(out).absolute(), wanted, parts)
    inputs = [path for model in opened for path in (str(model.root), model.adapter) if path]
    outputs.check_folder(job.output, inputs, job.ours())
    check_room([Need(job.output, job.most_bytes(), "the adapter")])
    spool = Workspace(job.root)
    spool.root.mkdir(parents=True, exist_ok=True)
    with explained(), WorkspaceLock(spool), devices.one_thread(True):
        job.begin()
        drivers = Drivers(stop or threading.Event(), "the same command goes on with it")
        with MmapReader() as reader, job.inputs.unchanged():
            deltas = Deltas(opened[0], opened[1], reader, drivers.check_stop)
            _factor_all(
                job, deltas, drivers, announce, Admission(capacity, drivers.check_stop), sizes, workers or cpu_count()
            )
            extracted = _write(job, deltas, announce)
        os.replace(job.output / f"{ADAPTER_NAME}.part", job.output / ADAPTER_NAME)
        shutil.rmtree(job.root)
    return extracted


def _check_wanted(wanted: Wanted) -> None:
    if wanted.rank < 1:
        raise UsageError(f"rank {wanted.rank} is none: a pair has at least rank 1")
    if wanted.dtype is not None and wanted.dtype not in MERGED_ALIASES:
        raise UsageError(f"'{wanted.dtype}' is no type that weights are written in: use {', '.join(MERGED_ALIASES)}")
    for pattern in (*wanted.include, *wanted.exclude, *wanted.save):
        try:
            compile_pattern(pattern)
        except ValueError as error:
            raise UsageError(str(error)) from error


def _choose(base: Checkpoint, other: Checkpoint, wanted: Wanted) -> list[Part]:
    """The tensors that are looked at, each with the form that it is to get."""
    floating = {
        name: entry.shape
        for name, entry in base.tensors.items()
        if DTYPES[entry.dtype].role == "merged" and not is_buffer(name, entry)
    }
    called = module_names(base.config, base.tensors)
    chosen = [part for part in parts_of(floating, base.config, called) if _is_wanted(part.name, wanted)]
    if not chosen:
        raise UsageError("no tensor is left: --include and --exclude are regular expressions on tensor names")
    problems = [text for part in chosen if (text := _mismatch(part, other)) is not None]
    known = base.tensors.keys()
    problems += [
        f"'{name}' is not in the base" for name in other.tensors if name not in known and _is_wanted(name, wanted)
    ]
    if problems:
        shown = [f"  {text}" for text in problems[:20]] + (["  …"] if len(problems) > 20 else [])
        raise TensorMismatchError(
            f"'{other.root}' is no fine-tune of '{base.root}' with the same tensors:\n" + "\n".join(shown) + "\n"
            "Remedy: an adapter can't add tensors, or rows to a vocabulary; leave such tensors out with --exclude."
        )
    formed = [_formed(part, wanted) for part in chosen]
    sides = [min(part.matrix) for part in formed if part.has_pair]
    if sides and wanted.rank > max(sides):
        raise UsageError(
            f"rank {wanted.rank} is larger than every matrix here: the largest has {max(sides)} singular values, lower "
            f"--rank to that or less"
        )
    return formed


def _mismatch(part: Part, other: Checkpoint) -> str | None:
    entry = other.tensors.get(part.name)
    if entry is None:
        return f"'{part.name}' is missing"
    if DTYPES[entry.dtype].role != "merged":
        return f"'{part.name}' is {entry.dtype}"
    return f"'{part.name}' is {part.shape} in the base but {entry.shape}" if entry.shape != part.shape else None


def _is_wanted(name: str, wanted: Wanted) -> bool:
    included = not wanted.include or any(re.search(pattern, name) for pattern in wanted.include)
    return included and not any(re.search(pattern, name) for pattern in wanted.exclude)


def _formed(part: Part, wanted: Wanted) -> Part:
    """The part with its form as asked for: a table or a named module may be saved whole."""
    asked = part.has_pair and any(
        re.search(pattern, part.module) or re.search(pattern, part.name) for pattern in wanted.save
    )
    if asked or (part.form == "embedding" and not wanted.embed_lora):
        return replace(part, form="whole")
    return part


# -- memory


def _rank(part: Part, wanted: Wanted) -> int:
    return min(wanted.rank, *part.matrix)


def _route(part: Part, wanted: Wanted) -> Route:
    return factor_route(part.matrix, "randomized" if wanted.svd == "auto" else "exact", _rank(part, wanted))


def projected_bytes(part: Part, wanted: Wanted) -> int:
    """Anonymous memory that the work on one tensor takes at the peak, beside what the program takes."""
    if not part.has_pair:
        return 2 * WINDOW_BYTES
    rank, (rows, columns) = _rank(part, wanted), part.matrix
    floats = factor_floats(part.matrix, rank, _route(part, wanted)) + HELD_PANELS * panel_floats(part.matrix)
    return 8 * (floats + 4 * rank * (rows + columns)) + 2 * WINDOW_BYTES


def _held(models: Sequence[InputModel], part: Part) -> int:
    """Scales and factors that reading one tensor of both models holds."""
    return sum(reading_bytes(model, part.name, 8) for model in models)


def _capacity(sizes: Mapping[str, int], allowed: int) -> int:
    """What tensors at work may take together."""
    reserved = RESERVED_BYTES + TORCH_BYTES
    largest = max(sizes, key=lambda name: sizes[name])
    need = sizes[largest]
    if need > allowed - reserved:
        raise MemoryBudgetError(
            f"'{largest}' takes {need / MIB:,.0f} MiB to factor, beside the {reserved / MIB:,.0f} MiB that the "
            f"program itself takes, and {allowed / MIB:,.0f} MiB are allowed: the smallest ceiling that would do is "
            f"--memory {-(-(need + reserved) // MIB)}MiB; or lower --rank, or --exclude it"
        )
    return allowed - reserved


# -- the work


def _factor_all(
    job: Spool,
    deltas: Deltas,
    drivers: Drivers,
    announce: Announcer,
    admission: Admission,
    sizes: Mapping[str, int],
    workers: int,
) -> None:
    stored = [job.base.tensors[part.name].nbytes for part in job.parts]
    left = [number for number, part in enumerate(job.parts) if job.kept(part) is None]
    done = sum(stored) - sum(stored[number] for number in left)
    announce(RunStarted(sum(stored), len(job.parts), done))
    if done:
        announce(Note(f"going on with earlier work: {len(job.parts) - len(left)} of {len(job.parts)} tensors are done"))

    def work(bundle: list[int]) -> None:
        part = job.parts[bundle[0]]
        with admission.holding(sizes[part.name]):
            _factor(job, deltas, part)
            deltas.release(part.name)
        announce(UnitFinished(part.name, "factor", stored[bundle[0]]))
        announce(TensorFinished(part.name))

    drivers.drive(([number] for number in left), work, workers)


def _factor(job: Spool, deltas: Deltas, part: Part) -> None:
    """Find the pair of one tensor, if it has changed and is to have one, and keep it."""
    import torch

    squared = deltas.squared(part.name)
    if not squared or not part.has_pair:
        job.keep(part, Kept(squared))
        return
    like = torch.empty(0, dtype=torch.float64)
    seed = philox.mask_key(0, 0, part.name) >> 1
    way = _route(part, job.wanted)
    found = factorize(deltas.panels(part.name, part.matrix), _rank(part, job.wanted), way, like, seed=seed)
    rank = int((found.values > job.wanted.sv_epsilon).sum())
    values = found.values[:rank]
    # Half of the scale goes to each side, so that neither overflows or loses digits in a narrow type.
    roots = values.sqrt()
    left, right = found.left[:, :rank] * roots, found.right[:, :rank] * roots
    a, b = (left.T, right) if part.turned else (right.T, left)
    dtype = job.dtype(part.name)
    encoded = [_encoded(side.contiguous().numpy(), dtype, part.name) for side in (a, b)]
    job.keep(part, Kept(squared, tuple(values.tolist())), *encoded)


def _encoded(values: Array, dtype: str, name: str) -> bytes:
    flat = values.reshape(-1)
    out = np.empty(flat.shape, DTYPES[dtype].bits)
    if encode(flat, dtype, out) >= 0:
        raise CheckpointError(f"'{name}' overflows {dtype}: write a wider type with --dtype float32")
    return out.tobytes()


# -- the adapter


def _write(job: Spool, deltas: Deltas, announce: Announcer) -> Extracted:
    """Put everything that was found into the adapter's files; the weights get their name when all is in order."""
    found = {part: kept for part in job.parts if (kept := job.kept(part)) is not None}
    changed = [part for part, kept in found.items() if kept.squared]
    pairs = [part for part in changed if found[part].rank]
    modules = {part.module for part in changed if part.form == "whole"}
    skip = job.wanted.skip_undecomposable
    bases = {part.name for part in job.parts}
    whole = [] if skip else [p for p in job.parts if p.form == "whole" and p.module in modules]
    whole += [] if skip else [p for p in job.parts if p.form == "bias" and p.module in modules]
    biases = [] if skip else [p for p in changed if p.form == "bias" and p.module not in modules]
    inside = {part.name for part in (*pairs, *whole, *biases)}
    lost = [part for part in changed if part.name not in inside]
    _check_found(job, changed, pairs, lost, whole, biases)
    for part in lost:
        announce(Note(f"'{part.name}' has changed and is not in the adapter: {_why_not(part, found[part])}"))
    targeted = {part.module for part in pairs}
    named = [(f"{PREFIX}{part.called}", part) for part in whole]
    named += [(f"{PREFIX}{part.module}{'.base_layer' * (part.module in targeted)}.bias", part) for part in biases]
    _write_weights(job, deltas, {part: found[part] for part in pairs}, named)
    ranks = {part.module: found[part].rank for part in pairs}
    config = adapter_config(
        str(job.base.reference),
        job.base.config,
        max(ranks.values(), default=job.wanted.rank),
        ranks,
        targets(list(ranks), [part.called for part in job.parts] + [n for n in job.base.tensors if n not in bases]),
        sorted({part.module for part in whole}),
        biases=bool(biases),
        turned=any(part.turned and part.form == "pair" for part in pairs),
    )
    energies = {p.module: min(1.0, sum(v * v for v in found[p].values) / found[p].squared) for p in pairs}
    total = sum(found[part].squared for part in pairs)
    energy = sum(energies[part.module] * found[part].squared for part in pairs) / total if total else 1.0
    write_atomic(job.output / ADAPTER_CONFIG, to_json(config))
    write_atomic(job.output / outputs.CARD_NAME, _card(job, ranks, energy).encode())
    whole_names = tuple(part.name for part in (*whole, *biases))
    lost_names = tuple(part.name for part in lost)
    return Extracted(job.output, ranks, energies, energy, whole_names, lost_names, len(bases) - len(changed))


def _check_found(
    job: Spool, changed: list[Part], pairs: list[Part], lost: list[Part], whole: list[Part], biases: list[Part]
) -> None:
    if not changed:
        raise CheckpointError(f"nothing differs from '{job.base.root}': there is no update to extract")
    stuck = [part for part in lost if part.form == "none"]
    if stuck and not job.wanted.skip_undecomposable:
        names = ", ".join(f"'{part.name}'" for part in stuck[:3]) + (" and others" if len(stuck) > 3 else "")
        raise CheckpointError(
            f"{names} changed, and an adapter can't hold them: they are no module's weight or bias. Leave them out "
            f"with --exclude, or everything of the kind with --skip-undecomposable"
        )
    if not (pairs or whole or biases):
        raise CheckpointError(
            "nothing of what changed has a pair: leave out --skip-undecomposable or lower --sv-epsilon"
        )


def _why_not(part: Part, kept: Kept) -> str:
    if part.has_pair:
        return f"all its singular values are at most the --sv-epsilon (its norm is {sqrt(kept.squared):.3g})"
    return "--skip-undecomposable leaves out what has no pair"


def _write_weights(job: Spool, deltas: Deltas, pairs: dict[Part, Kept], named: list[tuple[str, Part]]) -> None:
    tensors, sides = [], {}
    for part, kept in pairs.items():
        for side, (name, shape) in enumerate(zip(part.pair_names(), part.pair_shapes(kept.rank), strict=True)):
            tensors.append(OutputTensor(name, job.dtype(part.name), shape))
            sides[name] = part, side
    tensors += [OutputTensor(name, job.dtype(part.name), part.shape) for name, part in named]
    shard = replace(lay_out([tensors], {"format": "pt"}).shards[0], file=ADAPTER_NAME)
    writer = ShardWriter(job.output, shard)
    try:
        parts = dict(named)
        for place in shard.tensors:
            if place.name in sides:
                part, side = sides[place.name]
                writer.write(place.offset, np.frombuffer(job.pair(part)[side], np.uint8))
            else:
                _write_whole(writer, place.offset, place.dtype, deltas, parts[place.name].name)
        writer.seal(sha256=False)
    finally:
        writer.close()


def _write_whole(writer: ShardWriter, offset: int, dtype: str, deltas: Deltas, name: str) -> None:
    for values in deltas.values(name):
        data = np.frombuffer(_encoded(values, dtype, name), np.uint8)
        writer.write(offset, data)
        offset += data.nbytes
    deltas.release(name)


def _card(job: Spool, ranks: dict[str, int], energy: float) -> str:
    reference = job.base.reference
    base = str(reference) if is_hub_id(reference.model) else reference.label
    return (
        f"---\nbase_model: {json.dumps(base)}\nlibrary_name: peft\ntags: [lora, mergepipe]\n---\n\n"
        f"# A LoRA adapter\n\nExtracted by [mergepipe](https://pypi.org/project/mergepipe/) {version('mergepipe')} "
        f"from a fine-tune of `{base}`: {len(ranks)} modules, rank {max(ranks.values(), default=0)} at the most, "
        f"{energy:.2%} of their update's squared norm.\n"
    )
