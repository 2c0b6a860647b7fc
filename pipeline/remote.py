"""Models of a hub as a check sees them: everything small, and of the weights the headers only.

What comes out is a folder like that of a download, so that nothing further on is different: the safetensors files in it
are as long as the real ones, and empty beyond their headers, which were read by range. They take no room on the disk.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

from mergepipe.errors import CheckpointError
from mergepipe.pipeline.events import Announcer, Note
from mergepipe.pipeline.hub import Commit, ask, explained, fetch_files
from mergepipe.pipeline.references import is_hub_id
from mergepipe.pipeline.space import Need
from mergepipe.storage.header import MAX_HEADER_BYTES

FIRST_BYTES = 200_000
"""What is asked for at once: longer than nearly every header."""

_CONNECTIONS = 8
_LENGTH = 8


class HeadersOnly:
    """Finds models without their weights.

    Parameters
    ----------
    folder : Path
        Where the headers of models of the hub are put; must exist.

    Attributes
    ----------
    needs : list of Need
        What a download of the same models will take.
    """

    def __init__(self, folder: Path) -> None:
        self.needs: list[Need] = []
        self._folder = folder
        self._found: dict[str, Path] = {}

    def find(self, place: str, announce: Announcer) -> Path:
        """The folder of a model or an adapter; raises as :func:`mergepipe.pipeline.hub.fetch`.

        PyTorch files have no header that could be read alone: where they are not in the cache, they are downloaded.
        """
        if not is_hub_id(place):
            return Path(place)
        if place not in self._found:
            self._found[place] = self._of_hub(place, announce)
        return self._found[place]

    def _of_hub(self, hub_id: str, announce: Announcer) -> Path:
        found = ask(hub_id, announce)
        if isinstance(found, Path):
            return found
        weights = [file for file in found.left if file.endswith(".safetensors")]
        pickles = [file for file in found.left if file in found.weights and file not in weights]
        if pickles:
            announce(Note(f"'{hub_id}' has PyTorch files, which can't be looked at without a download: it is made now"))
        if not weights:
            return fetch_files(found, announce)
        self.needs.append(Need(found.cache, sum(found.left[file] for file in weights), f"the download of '{hub_id}'"))
        folder = self._folder / found.name / found.commit
        folder.mkdir(parents=True, exist_ok=True)
        small = [file for file in found.wanted if file not in weights]
        here = fetch_files(found, announce, leave=weights) if small else folder
        for file in small:
            (folder / file).symlink_to(here / file)
        with explained(hub_id), ThreadPoolExecutor(_CONNECTIONS) as pool:
            list(pool.map(lambda file: _write_outline(found, file, folder / file), weights))
        return folder


def _write_outline(commit: Commit, file: str, path: Path) -> None:
    """Write a safetensors file that is empty beyond its header."""
    raw = _read_range(commit, file, 0, FIRST_BYTES)
    length = int.from_bytes(raw[:_LENGTH], "little") + _LENGTH
    if len(raw) < length <= MAX_HEADER_BYTES + _LENGTH:
        raw += _read_range(commit, file, len(raw), length)
    with open(path, "xb") as out:
        out.write(raw[:length])
        out.truncate(commit.left[file])


def _read_range(commit: Commit, file: str, start: int, stop: int) -> bytes:
    """Bytes from `start` up to `stop`, or as many as there are."""
    import huggingface_hub

    utils = import_module("huggingface_hub.utils")  # whose names are not declared as exported
    url = huggingface_hub.hf_hub_url(commit.name, file, revision=commit.commit)
    headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"}
    response = utils.get_session().get(url, headers=headers, timeout=huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT)
    utils.hf_raise_for_status(response)
    found = bytes(response.content)
    if response.status_code != 206 and start:
        raise CheckpointError(f"'{commit.name}': the hub does not answer with a part of '{file}'")
    return found[: stop - start]
