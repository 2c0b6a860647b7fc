"""Where whole matrices are worked on and rows are scored: one device for the whole of a merge, resumes included.

A GPU may round a singular vector differently from a CPU, so rows from both must not meet in one tensor: the journal
records the device with which work began, and going on with another one is refused. Torch is imported only here and
where there is work for it: for matrices, and for rows where a GPU scores them (:mod:`mergepipe.pipeline.scoring`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mergepipe.errors import UsageError, WorkspaceError
from mergepipe.pipeline.machine import give_back_large_blocks
from mergepipe.storage.journal import Record


def choose(asked: str, recorded: str | None, *, needed: bool) -> str:
    """The device of a run, as torch names it.

    Parameters
    ----------
    asked : str
        'auto', 'cpu', 'cuda' or 'cuda:N'. 'auto' goes on with what is recorded, else takes the first GPU if there is
        one.
    recorded : str or None
        With which device unfinished work began.
    needed : bool
        Whether any tensor is worked on as a whole matrix; all other work is the CPU's.

    Raises
    ------
    UsageError
        If there is no such device.
    WorkspaceError
        If work began with another one.

    Examples
    --------
    >>> choose("auto", None, needed=False), choose("auto", "cpu", needed=True)
    ('cpu', 'cpu')
    """
    if not needed and asked in ("auto", "cpu"):
        return "cpu"
    device = recorded or _best() if asked == "auto" else _named(asked)
    if not _is_there(device):
        raise UsageError(f"there is no device '{device}' here: use --device cpu" + _how_to_restart(recorded))
    if not needed:
        return "cpu"
    if recorded is not None and device != recorded:
        raise WorkspaceError(
            f"the unfinished work was begun with --device {recorded}, and '{device}' may round differently: go on with "
            f"--device {recorded}" + _how_to_restart(recorded)
        )
    return device


def _how_to_restart(recorded: str | None) -> str:
    return ", or begin anew with `mergepipe run --restart`" if recorded is not None else ""


def _named(asked: str) -> str:
    kind, colon, number = asked.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise UsageError(f"'{asked}' is no device: use auto, cpu, cuda or cuda:N")
    return asked if colon or kind == "cpu" else "cuda:0"


def _is_there(device: str) -> bool:
    if device == "cpu":
        return True
    import torch

    return torch.cuda.is_available() and int(device.partition(":")[2]) < torch.cuda.device_count()


def _best() -> str:
    return "cuda:0" if _is_there("cuda:0") else "cpu"


def device_record(device: str) -> Record:
    """The journal's record of the device that matrices are worked on with."""
    return {"type": "device", "device": device}


@contextmanager
def one_thread(needed: bool) -> Iterator[None]:
    """Let torch use one thread in each worker: results then do not depend on how many processors there are.

    The blocks that it allocates are matrices; see :func:`mergepipe.pipeline.machine.give_back_large_blocks`.
    """
    if not needed:
        yield
        return
    import torch

    give_back_large_blocks()

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
