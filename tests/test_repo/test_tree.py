"""The tree is the architecture: what is on disk is packaged, imports point down, the face stays small."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergepipe

ROOT = Path(__file__).resolve().parents[2]

# The layer diagram: a module may import from its own layer and from these. "face" is the package itself.
MAY_IMPORT = {
    "cli": {"errors", "pipeline", "tasks", "storage", "face"},
    "pipeline": {"errors", "tasks", "storage"},
    "tasks": {"errors"},
    "storage": {"errors"},
    "errors": set(),
}
EXCEPTIONS = {f"tasks/{name}.py": {"storage"} for name in ("nodes", "copy_nodes", "sources")}
"""The graph's node bodies are the one place where computing meets bytes."""

LAYERS = ("cli", "pipeline", "tasks", "storage")
FORBIDDEN = re.compile(r"NotImplementedError|\b(?:TODO|FIXME|XXX)\b|pragma: no cover")


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SHIPPED = modules(*LAYERS, "src/mergepipe")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that a file imports; `from a import b` counts as a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: write the full name, not a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def layer_of(module: str) -> str:
    """Layer of a full name such as mergepipe.storage.header.read_header."""
    second = module.partition(".")[2].partition(".")[0]
    return second if second in (*LAYERS, "errors") else "face"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_package_on_disk_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    on_disk = {"mergepipe"}
    for path in modules(*LAYERS):
        on_disk.add(".".join(["mergepipe", *path.relative_to(ROOT).parent.parts]))
    assert sorted(settings["packages"]) == sorted(on_disk)
    folders = {"mergepipe": "src/mergepipe"} | {f"mergepipe.{layer}": layer for layer in LAYERS}
    assert settings["package-dir"] == folders


@pytest.mark.parametrize("folder", sorted({path.parent for path in SHIPPED}), ids=relative)
def test_every_package_says_what_it_is_for(folder: Path) -> None:
    source = folder / "__init__.py"
    assert source.is_file(), f"{relative(folder)} has no __init__.py"
    assert ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))), f"{relative(source)} has no docstring"


@pytest.mark.parametrize("path", modules(*LAYERS), ids=relative)
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0]
    allowed = MAY_IMPORT[own] | EXCEPTIONS.get(relative(path), set()) | {own}
    for line, name in imported(path):
        top = name.split(".")[0]
        assert top not in LAYERS, f"{relative(path)}:{line}: import mergepipe.{name}; the bare name is a second copy"
        if top == "mergepipe":
            assert layer_of(name) in allowed, f"{relative(path)}:{line}: {own} may not import {name}"


def test_errors_import_nothing_of_ours() -> None:
    assert not [name for _, name in imported(ROOT / "src/mergepipe/errors.py") if name.startswith("mergepipe")]


def test_face_is_small() -> None:
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in modules("src/mergepipe")}
    assert sum(lines.values()) < 200, lines


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_nothing_is_left_over(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        assert not FORBIDDEN.search(line), f"{relative(path)}:{number}: {line.strip()}"


@pytest.mark.parametrize("path", modules("pipeline", "tasks", "storage", "src/mergepipe"), ids=relative)
def test_only_the_command_line_prints(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        assert called != "print", f"{relative(path)}:{node.lineno}: send an event or log it"


@pytest.mark.parametrize("path", SHIPPED, ids=relative)
def test_text_has_an_encoding(path: Path) -> None:
    """That of the locale is another on another machine."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            named = any(keyword.arg == "encoding" for keyword in node.keywords)
            text = node.func.attr in ("read_text", "write_text")
            assert named or not text, f"{relative(path)}:{node.lineno}: say encoding='utf-8'"


def test_version_is_in_the_changelog() -> None:
    assert f"## {mergepipe.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_public_names_are_there() -> None:
    for name in mergepipe.__all__:
        assert getattr(mergepipe, name) is not None
        assert name in dir(mergepipe)
    with pytest.raises(AttributeError, match="it has __version__, add_model"):
        _ = mergepipe.biuld
