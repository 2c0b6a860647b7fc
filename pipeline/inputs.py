"""The input files of a plan, as a run finds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergepipe.errors import InputChangedError
from mergepipe.pipeline.plan import Plan
from mergepipe.storage.direct import supports_direct
from mergepipe.storage.manifest import ChunkManifest
from mergepipe.storage.workspace import Workspace


def check_inputs(manifests: Sequence[ChunkManifest]) -> None:
    """Refuse to read files that are not the ones the plan was made for.

    Raises
    ------
    InputChangedError
        Naming the file, what it was and what it is.
    """
    for manifest in manifests:
        for info in manifest.files:
            try:
                status = Path(info.path).stat()
            except FileNotFoundError:
                raise InputChangedError(
                    f"'{info.path}' is gone since the plan was made: bring it back, or build again"
                ) from None
            found = (status.st_size, status.st_mtime_ns, status.st_ino)
            if found != (info.size, info.mtime_ns, info.inode):
                raise InputChangedError(
                    f"'{info.path}' changed since the plan was made (size, time and inode were {info.size:,}, "
                    f"{info.mtime_ns}, {info.inode} and are {found[0]:,}, {found[1]}, {found[2]}): "
                    f"build again, or bring the old file back"
                )


def all_direct(manifests: Sequence[ChunkManifest]) -> bool:
    """Whether everything can be read past the page cache; one file of each folder answers for the others."""
    files = {Path(info.path).parent: info.path for manifest in manifests for info in manifest.files}
    return all(supports_direct(path) for path in files.values())


def mark_damage(workspace: Workspace, plan: Plan, manifests: Sequence[ChunkManifest], damaged: Sequence[str]) -> None:
    """Note which chunks of copied stores do not match their checksums: the next `build` then looks at all of them."""
    for number, (model, manifest) in enumerate(zip(plan.models, manifests, strict=True)):
        inside = [path for path in damaged if manifest.root is not None and path.startswith(f"{manifest.root}/")]
        workspace.mark_damage(number, model.label, inside)


def marked_damage(workspace: Workspace, plan: Plan) -> list[str]:
    """Chunks of copied stores that were found damaged, and not made anew since."""
    return [path for number, model in enumerate(plan.models) for path in workspace.damaged(number, model.label)]
