"""Every error mergepipe raises on purpose, and the exit code each one ends the process with.

One base, :class:`MergepipeError`; below it one class per exit code, and below those the leaves, each of which also
inherits the builtin that fits, so that ``except FileNotFoundError`` keeps working. A message says what is wrong,
where, what was found, what was expected and what to do about it. Nothing of ours is imported: any layer may raise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class MergepipeError(Exception):
    """Base of all errors of mergepipe; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(MergepipeError, ValueError):
    """A command or a function was called in a way that makes no sense (exit code 2)."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing wrong with a recipe: where (``$.models[1].parameters.density``) and what."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


class RecipeError(MergepipeError, ValueError):
    """The recipe is wrong (exit code 3). All its faults are reported at once.

    Parameters
    ----------
    faults : sequence of Fault
        At least one; kept in `faults`, one line each in the message.

    Examples
    --------
    >>> print(RecipeError([Fault("$.models", "is empty: list at least one model")]))
    $.models: is empty: list at least one model
    """

    exit_code = 3

    def __init__(self, faults: Sequence[Fault]) -> None:
        self.faults = tuple(faults)
        super().__init__("\n".join(str(fault) for fault in self.faults))


class CheckpointError(MergepipeError, ValueError):
    """A checkpoint can't be used as it is (exit code 4); `problems` are the things told, where those are several."""

    exit_code = 4
    problems: tuple[str, ...] = ()


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """A folder, an index or a shard that should be there is not."""


class HeaderError(CheckpointError):
    """A safetensors header is not valid, or does not fit its file."""


class TensorMismatchError(CheckpointError):
    """Models disagree about a tensor: one lacks it, or its shape or kind differs."""


class NonFiniteError(CheckpointError):
    """An input tensor holds a NaN or an infinity."""


class ShortReadError(CheckpointError, EOFError):
    """A file is shorter than its header said: it was truncated or changed while in use."""


class BudgetError(MergepipeError):
    """Memory or disk does not suffice (exit code 5)."""

    exit_code = 5


class MemoryBudgetError(BudgetError, MemoryError):
    """The memory ceiling is below what the largest unit needs."""


class DiskError(BudgetError, OSError):
    """The disk of an output or of a workspace fails, is gone, or can't be written."""


class DiskFullError(DiskError):
    """There is no room for the output."""


class HandOverError(BudgetError, RuntimeError):
    """The command that was to take a complete shard over has failed."""


class InTheWayError(MergepipeError):
    """Something is in the way, locked, or no longer what the plan was made for (exit code 6)."""

    exit_code = 6


class OutputExistsError(InTheWayError, FileExistsError):
    """The output folder holds something already, or is one of the inputs."""


class WorkspaceError(InTheWayError, RuntimeError):
    """The workspace is missing, of another plan or version, or in use by another process."""


class InputChangedError(InTheWayError, RuntimeError):
    """An input is no longer the file the plan was made for."""


class DamageError(MergepipeError, ValueError):
    """Stored bytes do not match their checksum (exit code 7)."""

    exit_code = 7


class Interrupted(MergepipeError):
    """The run was stopped on request (exit code 130)."""

    exit_code = 130
