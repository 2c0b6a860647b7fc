"""What a merge method is: reductions over a tensor, then one kernel.

A method never opens a file and never sees a whole tensor. The runner hands it one :class:`Tile` after another, each a
block of every model decoded to the working type, first to its reductions (in as many sweeps as it declares), then to
its kernel. What a reduction leaves behind is a few small arrays, the *state*; a kernel maps a tile and the state to the
same block of the output.

Blocks are a function of the tensor's shape alone, reductions are exact integers or one row of float64 partials per
block, folded in block order: so neither the chunk size nor the number of workers nor the order of execution changes a
bit of a result.

Adding a method is one file in :mod:`mergepipe.tasks.methods` that builds a :class:`MergeMethod`, and one row in
:mod:`mergepipe.tasks.registry`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

from mergepipe.tasks.blocks import Blocks, block_count, sampled_every
from mergepipe.tasks.parameter import Parameter

if TYPE_CHECKING:
    from mergepipe.tasks.listed import Listed
    from mergepipe.tasks.philox import Draw

Array = npt.NDArray[Any]
State = dict[str, Array]
"""Small arrays by name: what the reductions of one tensor found.

A public name is of the same shape for every tensor of a merge and is kept as a statistic; a name with a leading
underscore is the method's own, of any shape.
"""

PASSING = frozenset({"histogram", "_near_sample", "_scores_sample", "_scores_window", "_scores_moved"})
"""Entries of a state that later sweeps of the same tensor read and nobody else: large, and kept nowhere."""


def lasting(state: State) -> State:
    """What is kept of a state.

    Examples
    --------
    >>> list(lasting({"histogram": np.zeros(4), "thresholds": np.zeros(1)}))
    ['thresholds']
    """
    return {name: value for name, value in state.items() if name not in PASSING}


@dataclass(frozen=True, slots=True)
class Paper:
    """Where a method comes from."""

    title: str
    url: str


@dataclass(frozen=True, slots=True)
class Job:
    """One tensor as its method sees it: no file, no offset, only what the arithmetic depends on.

    Attributes
    ----------
    name : str
        Name of the output tensor.
    shape : tuple of int
    models : int
        K, the number of models merged; the base is not counted where the method works on deltas or has a primary.
    work : numpy dtype
        float32, or float64 where an input tensor is F64.
    params : mapping
        The method's global parameters, resolved for this tensor.
    model_params : tuple of mapping
        The per-model parameters, one mapping per model in recipe order.
    sparsify : str
        Name of the sparsifier that thins the deltas first; "none" if none does.
    sparsify_params : tuple of mapping
        Its parameters, one mapping per model.
    seed : int
        The recipe's seed.
    scope : {'tensor', 'model'}
        Where thresholds are taken: over this tensor, or over all that are merged in the same way.
    halves : bool
        Whether all inputs are stored as bfloat16 and taken as they are, so that differences have few significant bits:
        decides about the way to a result, never about the result.
    offset : int
        Position of the first model among all models of the merge, where those before it have been merged already and
        come in as what an earlier merge carried over.
    listed : int
        Numbers that its sweeps may list, at the most: likewise.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    work: np.dtype[Any]
    params: Mapping[str, Any]
    model_params: tuple[Mapping[str, Any], ...]
    sparsify: str = "none"
    sparsify_params: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    scope: str = "tensor"
    halves: bool = False
    offset: int = 0
    listed: int = 0

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return block_count(self.shape)

    def per_model(self, name: str) -> Array:
        """Parameter `name` of every model: shape (models,), in the working type."""
        return np.array([params[name] for params in self.model_params], self.work)


@dataclass(slots=True)
class Tile:
    """One block of one tensor, decoded to the working type. Its arrays belong to the worker and are used again.

    Attributes
    ----------
    index : int
        Number of the block.
    start : int
        Flat index of its first element in the tensor.
    base : ndarray, shape (n,), or None
        The base's (or the primary's) values. Not to be modified.
    values : ndarray, shape (models, n)
        Deltas to the base, or the models' own weights, as the method's `space` says. A sparsifier or a kernel may
        overwrite them; the next sweep decodes them anew.
    scratch : ndarray, shape (method.scratch_rows, n)
        Working memory with undefined contents.
    carried : ndarray, shape (n,), or None
        What an earlier merge, or an earlier stage of this one, has carried over. Not to be modified.
    importance : ndarray, shape (models, n), or None
        What each element is to each model, none negative, for a method that takes importances. Not to be modified.
    """

    index: int
    start: int
    base: Array | None
    values: Array
    scratch: Array
    carried: Array | None = None
    importance: Array | None = None


@dataclass(slots=True)
class Accumulator:
    """What one sweep of a reduction collects.

    Attributes
    ----------
    counts : int64 ndarray or None
        Exact integers, zeroed before use. Each worker counts into an array of its own; the runner adds them up, in any
        order.
    blocks : float64 ndarray, shape (blocks, ...), or None
        One row per block, written by whoever holds that block.
    listed : Listed or None
        Numbers that it lists one by one, all workers into the same list; of a reduction that lists some.
    """

    counts: Array | None = None
    blocks: Array | None = None
    listed: Listed | None = None

    @property
    def counted(self) -> Array:
        """`counts`, of a reduction that counts."""
        assert self.counts is not None
        return self.counts


class Reduction(Protocol):
    """One sweep over a tensor. Implementations are stateless: everything they know is in `job` and `state`.

    Five more attributes are optional: `stored`, see :func:`stored_sweep`; `reads`, see :func:`expected_reads`;
    `leaves`, see :func:`values_left`; `lists`, see :func:`values_listed`; and `sampled`, true for a sweep to which some
    blocks will do where the others would have to be read for it.
    """

    @property
    def name(self) -> str:
        """A word for plans and graphs, such as "coarse histogram"."""

    def needed(self, job: Job, state: State) -> bool:
        """False if the state already answers this reduction, so that the sweep is skipped."""

    def shapes(self, job: Job) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
        """Shapes of `Accumulator.counts` and of one row of `Accumulator.blocks`; None for one that is not used."""

    def update(self, job: Job, state: State, accumulator: Accumulator, tile: Tile) -> None:
        """Add one tile. Runs in several threads at once, each with a tile and `counts` of its own."""

    def combine(self, job: Job, state: State, accumulator: Accumulator) -> State:
        """New entries for the state, once all tiles are in."""


def expected_reads(sweeps: Iterable[Reduction], job: Job) -> float:
    """How often sweeps are expected to read a tensor's inputs, if they can't be held.

    Once each, but for samples, and for sweeps that say otherwise by their `reads`: one that is made only where a guess
    has missed is none.
    """
    return sum(1 / sampled_every(job.blocks) if is_sample(sweep) else getattr(sweep, "reads", 1.0) for sweep in sweeps)


def is_sample(sweep: Reduction) -> bool:
    """Whether some blocks will do for a sweep where the others would have to be read for it."""
    return getattr(sweep, "sampled", False)


def values_left(sweeps: Iterable[Reduction], job: Job) -> int:
    """How many numbers sweeps leave in the state beside a few per model, at the most.

    A sweep that leaves some for each block, row or column, or for each pair of models, says how many by its method
    ``leaves(job)``.
    """
    return sum(getattr(sweep, "leaves", _few)(job) for sweep in sweeps)


def values_listed(sweeps: Iterable[Reduction], job: Job) -> int:
    """How many float32 numbers a sweep lists one by one, at the most: as its method ``lists(job)`` says."""
    return max((getattr(sweep, "lists", _few)(job) for sweep in sweeps), default=0)


def _few(job: Job) -> int:
    return 0


@dataclass(frozen=True, slots=True)
class Shared:
    """What a round found out about the whole model.

    Attributes
    ----------
    common : State
        The same for every tensor of the group.
    each : State
        Arrays whose first axis is the tensors of the group, in plan order: each tensor gets its own row.
    """

    common: State = field(default_factory=dict)
    each: State = field(default_factory=dict)

    def of(self, position: int) -> State:
        """Entries for the state of the tensor at this position of the group.

        Examples
        --------
        >>> Shared({"a": np.array(1)}, {"b": np.array([[2.0], [3.0]])}).of(1)
        {'a': array(1), 'b': array([3.])}
        """
        return {**self.common, **{name: rows[position] for name, rows in self.each.items()}}

    def __or__(self, other: Shared) -> Shared:
        """Both; entries of `other` replace those of the same name."""
        return Shared({**self.common, **other.common}, {**self.each, **other.each})


class Round(Protocol):
    """A sweep over all tensors of a group, before any of them is made: a reduction of the whole model.

    A *group* is all tensors that are merged by the same method and sparsifier from the same models, with the same
    parameters as far as rounds depend on them. The runner makes the round's reductions for every tensor, starting from
    the shared state of earlier rounds, keeps what the tensor contributes, and drops its state; `finish` then says what
    all tensors are to know.
    """

    @property
    def name(self) -> str:
        """A word for plans and events."""

    def reductions(self, job: Job) -> tuple[Reduction, ...]:
        """The sweeps over one tensor."""

    def counts(self, job: Job, state: State) -> Array | None:
        """Exact integers (int64) that are added up over the tensors, in any order."""

    def values(self, job: Job, state: State) -> Array | None:
        """A few numbers (float64) that are collected in plan order."""

    def finish(
        self, jobs: Sequence[Job], shared: Shared, counts: Array | None, values: Sequence[Array | None]
    ) -> Shared:
        """New entries for the shared state; `shared` is that of the rounds before."""


class Offloading(Reduction, Protocol):
    """A reduction that another device can help with, to the same bits."""

    def offload(self, job: Job, state: State, accumulator: Accumulator, tiles: Iterable[Tile], scorer: Any) -> None:
        """Add a run of tiles, in ascending order; `scorer` is a :class:`mergepipe.tasks.rows_torch.Scorer`."""


def can_offload(reduction: Reduction) -> TypeGuard[Offloading]:
    """Whether another device can help with a reduction."""
    return hasattr(reduction, "offload")


class MatrixSolver(Protocol):
    """Works on one whole matrix, step by step, and then gives out the rows of its update. See `tasks/subspace`."""

    def step(self, number: int) -> None:
        """Take the next step, numbered from 0."""

    def findings(self) -> State:
        """What was found out, once the last step is taken: small arrays of one shape for all tensors of a merge."""

    def add_update(self, span: tuple[int, int], out: Array) -> None:
        """Add rows `span` of the update to `out`, float64, shape (rows, columns). In several threads at once."""


@dataclass(frozen=True, slots=True)
class WholeMatrix:
    """How a method works on whole matrices; tensors that are none of those go through its kernel.

    Attributes
    ----------
    takes : callable
        Whether a tensor is worked on as a whole matrix.
    steps : callable
        Names of the steps: each waits for the one before, and the rows of the output for the last one.
    start : callable
        ``start(job, sources, device)``: a solver. `sources` are :class:`mergepipe.tasks.subspace.panels.Sources`.
    peak : callable
        float64 values that the solver holds at its peak: a function of shape and parameters alone. Raises `RecipeError`
        where the parameters do not suit the shape.
    merges : bool
        Whether the solver asks for what the method's kernel makes of all models together.
    onto_base : bool
        Whether the output is the base plus the update, or the update alone.
    """

    takes: Callable[[Job], bool]
    steps: Callable[[Job], tuple[str, ...]]
    start: Callable[[Job, Any, str], MatrixSolver]
    peak: Callable[[Job], int]
    merges: bool = False
    onto_base: bool = True


Kernel = Callable[[Job, State, Tile, Array], None]
"""Writes one block of the output, in the working type, into the last argument, shape (n,)."""


InPlace = Callable[[Job, State, Tile], None]
"""Changes `tile.values`."""


StoredKernel = Callable[[Sequence[Array], Array, Blocks], bool]
"""From the stored bits of a unit (the base first, if there is one) to those of its output, shape (n,). False, with the
output undefined, where a value is not finite or does not fit: then the general way finds out where."""

StoredSweep = Callable[[Sequence[Array], Accumulator, Blocks], bool]
"""The same for a reduction, which adds to an accumulator."""

StoredKernels = Callable[[Job, State], StoredKernel | None]


def no_stored(job: Job, state: State) -> StoredKernel | None:
    """The stored kernel of a method that has none."""
    return None


def stored_sweep(reduction: Reduction, job: Job, state: State) -> StoredSweep | None:
    """How a reduction adds up stored bits as they are; None if it has no way to."""
    own: Callable[[Job, State], StoredSweep | None] | None = getattr(reduction, "stored", None)
    return None if own is None else own(job, state)


Masks = Callable[[Job, State, Tile], Array]
"""One mask per model, bool, shape (models, n), of a tile that the kernel has just worked on. A method that has masks
leaves ``rescalers`` (float64, (models,)) in the state by a round; see :mod:`mergepipe.pipeline.masks`."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """A thinning that goes by magnitude and by chance alone, one number per model.

    Attributes
    ----------
    least : tuple of float
        Smallest magnitude that is kept.
    most : tuple of float, or None
        Largest one; None where none is too large.
    factors : tuple of float
        What is kept is multiplied by it.
    draw : Draw or None
        What is dropped by chance; None where nothing is.
    """

    least: tuple[float, ...]
    most: tuple[float, ...] | None
    factors: tuple[float, ...]
    draw: Draw | None = None


def no_bounds(job: Job, state: State) -> Bounds | None:
    """The bounds of a sparsifier that goes by something else."""
    return None


def no_reductions(job: Job) -> tuple[Reduction, ...]:
    """The reductions of a method that needs none."""
    return ()


def no_rounds(jobs: Sequence[Job]) -> tuple[Round, ...]:
    """The rounds of what looks at one tensor at a time."""
    return ()


@dataclass(frozen=True, slots=True)
class Sparsifier:
    """A way to thin a task vector; plugs in before any method that works on deltas.

    Attributes
    ----------
    name, title, summary, paper, specification, known, chosen
        As in :class:`MergeMethod`.
    parameters : tuple of Parameter
        Each may differ per model.
    reductions : callable
        Sweeps it needs for one tensor, in order.
    mask : callable
        ``mask(job, state, tile)`` thins (and rescales) `tile.values` in place. Called by the kernels of the methods
        that work on deltas, which may fuse it with what they do next.
    bounds : callable
        ``bounds(job, state)`` is all that `mask` does, or None where it does more.
    rounds : callable
        Sweeps over the whole model that come first, given the jobs of a group in plan order.
    scopes : tuple of str
        Where it can take its thresholds: "tensor", "model".
    """

    name: str
    title: str
    summary: str
    parameters: tuple[Parameter, ...]
    reductions: Callable[[Job], tuple[Reduction, ...]]
    mask: Callable[[Job, State, Tile], None]
    bounds: Callable[[Job, State], Bounds | None] = no_bounds
    rounds: Callable[[Sequence[Job]], tuple[Round, ...]] = no_rounds
    scopes: tuple[str, ...] = ("tensor",)
    paper: Paper | None = None
    specification: str = "published"
    known: tuple[str, ...] = field(default=())
    chosen: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class MergeMethod:
    """A merge method, declared.

    Attributes
    ----------
    name : str
        As it stands in a recipe.
    title, summary : str
        For `mergepipe methods` and the model card.
    base : {'required', 'optional', 'primary', 'ignored'}
        Whether deltas are taken to a base; 'optional' if they are where there is one, and the models' own weights are
        merged else; 'primary' if the base is one of the two parties; 'ignored' if a base only lends its configuration.
    space : {'deltas', 'weights'}
        What `Tile.values` holds; of a method whose base is optional, deltas where there is a base.
    parameters : tuple of Parameter
    kernel : callable
    reductions : callable
        The sweeps it needs, sparsifier's included, given the job.
    min_models, max_models : int, int or None
        How many models it takes, the base not counted (except where `base` is 'ignored').
    trim : str
        The sparsifier it brings along, which `sparsify:` replaces; "none" if none.
    scratch_rows : int
        Rows of working memory its kernel and reductions need per tile.
    stored : callable
        ``stored(job, state)`` is a kernel from bits to bits for units whose inputs and output are all BF16, or None;
        see :data:`StoredKernel`. It gives the same bits as `kernel`.
    matrix : WholeMatrix or None
        For a method that looks at whole matrices.
    thin : callable or None
        Zeroes what is dropped before anything is merged, in place, of a method that drops on its own account: what the
        sparsifier drops included. None where that is all.
    rounds : callable
        Sweeps over the whole model that come first, after those of the sparsifier, given the jobs of a group in plan
        order.
    rounds_read : tuple of str
        The method's own parameters that its rounds depend on: tensors that differ in one are not of one group.
    masks : callable or None
        What is kept beside the output for each model; see :data:`Masks`.
    importance : bool
        Whether each model comes with a checkpoint of importances: `importance` beside it in the recipe.
    takes : {'models', 'adapters'}
        What it merges: whole models, or LoRA adapters, whose pairs belong together.
    scopes : tuple of str
        Where the method itself can take thresholds: "tensor", "model".
    carries : bool
        Whether the merge is made in two stages: first the merged task vectors alone, which are kept, so that models can
        be added later; then these, scaled by something known of all of them, on the base. In the second stage a job has
        no models, and its kernel finds the first one's result in `Tile.carried`; see :mod:`mergepipe.pipeline.stages`.
    paper : Paper or None
    specification : str
        "published", or the version of a reconstruction such as "tadrop-r1".
    known, chosen : tuple of str
        For a reconstruction: what is known of the original, and what is our choice.
    """

    name: str
    title: str
    summary: str
    base: Literal["required", "optional", "primary", "ignored"]
    space: Literal["deltas", "weights"]
    parameters: tuple[Parameter, ...]
    kernel: Kernel
    reductions: Callable[[Job], tuple[Reduction, ...]] = no_reductions
    min_models: int = 1
    max_models: int | None = None
    trim: str = "none"
    scratch_rows: int = 0
    stored: StoredKernels = no_stored
    matrix: WholeMatrix | None = None
    thin: InPlace | None = None
    rounds: Callable[[Sequence[Job]], tuple[Round, ...]] = no_rounds
    rounds_read: tuple[str, ...] = ()
    masks: Masks | None = None
    importance: bool = False
    takes: Literal["models", "adapters"] = "models"
    scopes: tuple[str, ...] = ("tensor",)
    carries: bool = False
    paper: Paper | None = None
    specification: str = "published"
    known: tuple[str, ...] = field(default=())
    chosen: tuple[str, ...] = field(default=())

    def whole(self, job: Job) -> WholeMatrix | None:
        """How this tensor is worked on as a whole matrix; None if it goes through the kernel."""
        return self.matrix if self.matrix is not None and self.matrix.takes(job) else None

    def parameter(self, name: str) -> Parameter | None:
        """The declaration of parameter `name`, or None."""
        return next((p for p in self.parameters if p.name == name), None)
