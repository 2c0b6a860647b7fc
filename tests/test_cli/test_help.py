"""Every command explains itself, shows an example, and stands in the README."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from mergepipe.cli.main import COMMANDS, group
from mergepipe.pipeline.recipe import parse_recipe
from mergepipe.tasks.registry import METHODS
from support.jobs import write_job

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "numba", "dask", "zarr", "numpy", "transformers", "rich", "pydantic", "scipy")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTEXT = click.Context(group, info_name="mergepipe")


def command(name: str) -> click.Command:
    found = group.get_command(CONTEXT, name)
    assert found is not None
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_an_example(name: str) -> None:
    result = CliRunner().invoke(group, [name, "--help"], prog_name="mergepipe")
    assert result.exit_code == 0
    example = result.output.partition("Example:\n")[2].partition("Options:")[0]
    assert f"mergepipe {name}" in example


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_and_example_is_sound(name: str) -> None:
    found = command(name)
    for option in found.params:
        if isinstance(option, click.Option):
            assert option.help, f"{name} {option.opts[0]} has no help"
            assert option.help.endswith("."), f"{name} {option.opts[0]}: a sentence ends with a full stop"
    known = {opt for option in found.params for opt in option.opts}
    for line in (found.help or "").splitlines():
        if line.strip().startswith(f"mergepipe {name}"):
            words = line.partition("#")[0].partition("&&")[0].split()
            used = {word for word in words if word.startswith("-")}
            assert used <= known, f"{name}: the example uses {used - known}"


def test_readme_lists_every_command() -> None:
    table = README.partition("## The commands")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `mergepipe ([\w-]+)", table, re.MULTILINE)) == sorted(COMMANDS)


@pytest.mark.parametrize("source", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/switching.md"])
def test_documents_use_options_that_exist(source: str) -> None:
    text = (ROOT / source).read_text(encoding="utf-8")
    for name, words in re.findall(r"\b(?:mergepipe )?([a-z-]+)((?: [^\s`|#&]+)* --?[^\n`|#&]*)", text):
        if name in COMMANDS:
            known = {opt for option in command(name).params for opt in option.opts} | {"--help"}
            used = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", words))
            assert used <= known, f"{source}: mergepipe {name}{words}"


@pytest.mark.parametrize("source", ["README.md", "docs/switching.md"])
def test_recipes_of_documents_load(source: str) -> None:
    text = (ROOT / source).read_text(encoding="utf-8")
    recipes = [recipe for recipe in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) if "merge_method" in recipe]
    assert recipes
    for recipe in recipes:
        assert parse_recipe(recipe, source).merge_method in METHODS


def test_help_loads_no_large_library() -> None:
    code = (
        "import sys; from mergepipe.cli.main import main; main(['--help']); "
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stderr.strip() == "[]"
    for name in COMMANDS:
        assert f"  {name} " in result.stdout


def test_help_answers_at_once() -> None:
    """Under a quarter of a second of a processor, the best of five: other work on the machine is no fault of ours."""
    seconds = []
    for _ in range(5):
        process = subprocess.Popen([sys.executable, "-m", "mergepipe", "--help"], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(used.ru_utime + used.ru_stime)
    assert min(seconds) < 0.25


def test_importing_the_package_loads_no_large_library() -> None:
    code = f"import sys, mergepipe; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_build_and_run_load_what_they_need(tmp_path: Path) -> None:
    """Nothing is compiled, no graph is made and no chunk copied to plan; and numba finds no SciPy."""
    write_job(tmp_path)
    code = (
        "import sys; from mergepipe.cli.main import main; code = main(sys.argv[1:]); "
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    loaded = {}
    for command_line in (("build", "recipe.yaml"), ("run", "--quiet")):
        result = subprocess.run(
            [sys.executable, "-c", code, *command_line], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        loaded[command_line[0]] = result.stderr.splitlines()[-1]
    assert loaded == {"build": "['numpy', 'pydantic']", "run": "['dask', 'numba', 'numpy', 'pydantic', 'zarr']"}


def test_the_collector_looks_at_no_imports(tmp_path: Path) -> None:
    write_job(tmp_path)
    code = (
        "import gc, sys; from mergepipe.cli.main import main; code = main(sys.argv[1:]); "
        "print(gc.isenabled(), gc.get_freeze_count() > 10_000, file=sys.stderr); sys.exit(code)"
    )
    for command_line in (("build", "recipe.yaml"), ("run", "--quiet")):
        result = subprocess.run(
            [sys.executable, "-c", code, *command_line], capture_output=True, text=True, cwd=tmp_path, check=True
        )
        assert result.stderr.splitlines()[-1] == "True True"


@pytest.mark.parametrize("name", ["build", "run"])
def test_numpy_begins_no_threads(tmp_path: Path, name: str) -> None:
    """Those of its BLAS spin until they have work; what a process starts is to have its BLAS as ever."""
    code = (
        "import os, sys; from mergepipe.cli.main import main; main(sys.argv[1:]); import numpy; "
        "print(len(os.listdir('/proc/self/task')), os.environ.get('OPENBLAS_NUM_THREADS'))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    result = subprocess.run(
        [sys.executable, "-c", code, name], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    )
    assert result.stdout.splitlines()[-1] == "1 None"
