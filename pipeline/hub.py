"""Models of a hub, by id: their files come into huggingface_hub's own cache, and a merge reads them there.

Needed is the extra `hub`. What is fetched is what a merge needs: one set of weights (safetensors, else PyTorch files),
the JSON files and those of the tokenizer. A download that was interrupted goes on, and what is in the cache is not
fetched again. The revision is settled first, once, so that all files are of one commit, which the plan then names: the
folder that a plan reads is that commit's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, MergepipeError
from mergepipe.pipeline.adapter import CONFIG as ADAPTER_CONFIG
from mergepipe.pipeline.adapter import WEIGHTS as ADAPTER_WEIGHTS
from mergepipe.pipeline.events import Announcer, DownloadProgress, Note
from mergepipe.pipeline.references import split_revision
from mergepipe.pipeline.side_files import PATTERNS
from mergepipe.pipeline.space import Need, check_room
from mergepipe.storage.checkpoint import (
    CONFIG,
    INDEX,
    NO_WEIGHTS,
    PICKLED,
    PICKLED_INDEX,
    PICKLED_SUFFIXES,
    SINGLE,
    read_index,
)

Fetch = Callable[[str], Path]
"""Brings one file of a commit into the cache: its path there."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What a hub says of a model at one commit.

    Attributes
    ----------
    hub_id : str
        As it was asked for.
    name, commit : str
    revision : str or None
        Branch or tag, as it was asked for.
    wanted : tuple of str
        The files that a merge needs.
    weights : frozenset of str
        Those of them that hold tensors.
    left : dict of str to int
        Those of them that are not in the cache, and their sizes.
    cache : Path
    """

    hub_id: str
    name: str
    revision: str | None
    commit: str
    wanted: tuple[str, ...]
    weights: frozenset[str]
    left: dict[str, int]
    cache: Path


def fetch(hub_id: str, announce: Announcer) -> Path:
    """The folder of a model of the hub, in the cache; what is missing there is downloaded.

    Parameters
    ----------
    hub_id : str
        ``org/name`` or ``org/name@revision``.
    announce : Announcer
        Told what will be downloaded, and how far that is.

    Returns
    -------
    Path
        Its last part is the commit.

    Raises
    ------
    CheckpointNotFoundError
        If huggingface_hub is not installed; if the hub has no such model or revision, or does not show it; if it can't
        be asked, and the cache does not have the model either.
    CheckpointError
        If the model is gated, or a download fails.
    DiskFullError
        If there is no room for what is to be downloaded.
    """
    found = ask(hub_id, announce)
    return found if isinstance(found, Path) else fetch_files(found, announce)


def ask(hub_id: str, announce: Announcer) -> Commit | Path:
    """What the hub has under an id; if it can't be asked, the folder of an earlier download. Raises as :func:`fetch`.

    Of the files, only an index is fetched.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointNotFoundError(
            f"'{hub_id}' is no folder; to fetch it from the hub, install mergepipe[hub]"
        ) from error
    name, revision = split_revision(hub_id)
    with explained(hub_id), _without_bars():
        try:
            found = huggingface_hub.HfApi().model_info(name, revision=revision, files_metadata=True)
        except Exception as error:
            if not _is_unreachable(error):
                raise
            return _cached(hub_id, error, announce)
        sizes = {one.rfilename: one.size or 0 for one in found.siblings or () if _is_plain(one.rfilename)}

        def get(file: str) -> Path:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=found.sha))

        wanted, weights = wanted_files(sizes, get, hub_id)
        cached = huggingface_hub.try_to_load_from_cache
        left = {file: sizes[file] for file in wanted if not isinstance(cached(name, file, revision=found.sha), str)}
        total, whole = sum(left.values()), sum(sizes[file] for file in wanted)
        counted = f"{len(wanted)} files, {whole:,} bytes, {total:,} of them to be downloaded"
        announce(Note(f"'{hub_id}' is commit {found.sha}: {counted}"))
        cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
        return Commit(hub_id, name, revision, str(found.sha), tuple(wanted), frozenset(weights), left, cache)


def fetch_files(commit: Commit, announce: Announcer, leave: Collection[str] = ()) -> Path:
    """Download what is not in the cache, but for the files to `leave`, which are not all; the folder there.

    Raises as :func:`fetch`.
    """
    import huggingface_hub

    left = {file: size for file, size in commit.left.items() if file not in leave}
    total = sum(left.values())
    with explained(commit.hub_id), _without_bars():

        def get(file: str, revision: str | None) -> Path:
            return Path(huggingface_hub.hf_hub_download(commit.name, file, revision=revision))

        check_room([Need(commit.cache, total, f"the download of '{commit.hub_id}'")])
        for file, size in left.items():
            get(file, commit.commit)
            announce(DownloadProgress(commit.hub_id, size, total))
        first = next(file for file in commit.wanted if file not in leave)
        # By its own name once, so that the cache knows which commit that is when the hub can't be asked.
        get(first, commit.revision)
        return get(first, commit.commit).parent


def wanted_files(sizes: Mapping[str, int], get: Fetch, hub_id: str) -> tuple[list[str], list[str]]:
    """Which files of a repository a merge needs, and which of these hold the weights.

    Parameters
    ----------
    sizes : mapping of str to int
        The files at the top of the repository.
    get : callable
        Brings an index here, which says what its shards are.
    hub_id : str
        For messages.

    Raises
    ------
    CheckpointNotFoundError
        If there are no weights, or an index names a file that is not there.
    """
    weights = _weights(sizes, get)
    missing = sorted(set(weights) - set(sizes))
    if missing or not weights:
        what = f"'{missing[0]}', which its index names" if missing else "weights: no *.safetensors, no *.bin"
        raise CheckpointNotFoundError(f"'{hub_id}' has no {what}")
    beside = [
        name
        for name in sizes
        if name not in weights
        and (fnmatch(name, "*.json") or any(fnmatch(name, pattern) for pattern in PATTERNS))
        and not name.endswith((".safetensors", *PICKLED_SUFFIXES))
    ]
    return [*sorted(beside), *sorted(weights)], weights


def _weights(sizes: Mapping[str, int], get: Fetch) -> list[str]:
    if ADAPTER_CONFIG in sizes and CONFIG not in sizes:
        return [name for name in ADAPTER_WEIGHTS if name in sizes][:1]
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX)):
        if single in sizes:
            return [single]
        if index in sizes:
            return sorted(set(read_index(get(index)).values()))
    for end in (".safetensors", ".bin"):
        found = [name for name in sizes if name.endswith(end) and name not in NO_WEIGHTS]
        if found:
            return found
    return []


def _is_plain(name: str) -> bool:
    return "/" not in name and "\\" not in name and name.isprintable() and name not in ("", ".", "..")


def _is_unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked, rather than having given an answer."""
    response = getattr(error, "response", None)
    if response is not None:
        return bool(response.status_code >= 500)
    return isinstance(error, OSError) or type(error).__module__.startswith(("httpx", "httpcore", "requests"))


def _cached(hub_id: str, error: Exception, announce: Announcer) -> Path:
    """The folder of an earlier download."""
    import huggingface_hub

    name, revision = split_revision(hub_id)
    for file in (CONFIG, ADAPTER_CONFIG, SINGLE, INDEX, PICKLED, PICKLED_INDEX, *ADAPTER_WEIGHTS):
        found = huggingface_hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            folder = Path(found).parent
            announce(Note(f"the hub can't be asked about '{hub_id}': taken from the cache, commit {folder.name}"))
            return folder
    raise CheckpointNotFoundError(
        f"'{hub_id}' is no folder, is not in the cache, and the hub can't be asked ({_short(error)}): check the "
        "network and HF_HUB_OFFLINE, or download it elsewhere and give the folder"
    ) from error


@contextmanager
def explained(hub_id: str) -> Iterator[None]:
    """Turn the hub's answers into errors of ours that say what to do."""
    from huggingface_hub import errors

    name, revision = split_revision(hub_id)
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"'{hub_id}' is gated: accept its terms on the hub's page, and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointNotFoundError(f"'{name}' has no revision '{revision}' on the hub") from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise CheckpointNotFoundError(
            f"'{hub_id}' is no folder, and the hub has no such model, or does not show it without `hf auth login`"
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"'{hub_id}' can't be downloaded: {_short(error)}. Run it again to go on") from error
    except Exception as error:
        if not _is_unreachable(error) or isinstance(error, MergepipeError):
            raise
        raise CheckpointError(f"'{hub_id}' can't be downloaded: {_short(error)}. Run it again to go on") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep huggingface_hub from drawing on the terminal: progress is an event."""
    bars = import_module("huggingface_hub.utils")  # whose names are not declared as exported
    if bars.are_progress_bars_disabled():
        yield
        return
    bars.disable_progress_bars()
    try:
        yield
    finally:
        bars.enable_progress_bars()


def _short(error: Any) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
