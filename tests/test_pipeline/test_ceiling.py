"""Measured peaks stay under the ceiling: whole runs in fresh processes, imports and compilation included."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import MemoryBudgetError
from mergepipe.pipeline.memory import MIB, parse_bytes
from mergepipe.pipeline.summary import scheduled
from mergepipe.storage.header import encode_header
from mergepipe.tasks.registry import METHODS
from support.jobs import build_job, write_job
from support.vocabularies import byte_tokenizer, write_model

TESTS = Path(__file__).parents[1]
SHAPES = {
    "square": {"a": (3000, 2048), "b": (2048, 3000), "c": (6_000_000,)},
    "oblong": {"a": (512, 16384), "b": (65536, 120), "c": (70_001,), "d": (40, 65536)},
}
"""Two models: 18 million parameters each."""
VALUES = {"weight": 0.5, "density": 0.5, "t": 0.3}
OF_MODELS = [name for name, method in METHODS.items() if method.takes == "models"]
ELEMENTWISE = [name for name in OF_MODELS if METHODS[name].matrix is None]


@pytest.fixture(scope="module")
def models_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a base and three models of the given shapes."""

    @cache
    def written(shapes: str) -> Path:
        folder = tmp_path_factory.mktemp(shapes)
        write_job(folder, models=3, shapes=SHAPES[shapes])
        return folder

    return written


@pytest.fixture(scope="module")
def models(models_of: Callable[[str], Path]) -> Path:
    return models_of("square")


def write_recipe(models: Path, folder: Path, name: str) -> Path:
    """A recipe for a method with as many models as it takes."""
    method = METHODS[name]
    known = {parameter.name for parameter in method.parameters if not parameter.without_effect}
    count = min(method.max_models or 3, 3)
    recipe: dict[str, Any] = {
        "merge_method": name,
        "models": [{"model": str(models / f"expert-{number}")} for number in range(1, count + 1)],
        "parameters": {key: value for key, value in VALUES.items() if key in known},
    }
    if method.base != "ignored":
        recipe["base_model"] = str(models / "base")
    if method.importance:
        for entry in recipe["models"]:
            entry["importance"] = str(importance_of(Path(entry["model"])))
    if name.startswith("della"):  # it ranks rows, which must not be too long for that
        recipe["rules"] = [{"match": "^c$", "merge_method": "task_arithmetic", "parameters": {"weight": 0.5}}]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def importance_of(model: Path) -> Path:
    """A checkpoint of magnitudes; of a model of holes, which is only planned with, that itself."""
    if (model / "model.safetensors").stat().st_size > 1 << 30:
        return model
    folder = model.with_name(f"importance-of-{model.name}")
    if not folder.exists():
        shutil.copytree(model, folder)
        tensors = {name: np.abs(value) for name, value in load_file(model / "model.safetensors").items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def smallest(folder: Path, **how: Any) -> str:
    """The smallest ceiling that would do, as `build` says it."""
    with pytest.raises(MemoryBudgetError) as caught:
        build_job(folder, memory="1MiB", **how)
    found = re.search(r"--memory (\d+MiB)", str(caught.value))
    assert found, caught.value
    return found[1]


def peak(work: Path, compile_anew: Path | None = None, **options: Any) -> dict[str, int]:
    """What a run in a fresh process took."""
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    if compile_anew is not None:
        environment["NUMBA_CACHE_DIR"] = str(compile_anew)
    command = [sys.executable, "-m", "support.peak", str(work), json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def check(
    models: Path, folder: Path, name: str, memory: str | None, store: str, times: float = 1, **options: Any
) -> None:
    """Run under a ceiling: `memory`, or some times the smallest that would do."""
    write_recipe(models, folder, name)
    workers = options["workers"]
    if memory is None:
        memory = f"{int(times * int(smallest(folder, workers=workers, store=store).removesuffix('MiB')))}MiB"
    work = build_job(folder, memory=memory, chunk_size="8MiB", workers=workers, store=store)
    allowed = parse_bytes(memory)
    found = peak(work, **options)
    measured = max(found["peak"], found["told"])
    print(f"{name}, {memory}, {store}, {options}: {measured / MIB:.0f} MiB measured")
    assert measured <= allowed, f"{name}: {measured / MIB:.0f} MiB measured, {memory} allowed"


@pytest.mark.parametrize(("name", "memory"), [("linear", None), ("ties", "512MiB")])
def test_a_run_stays_under_its_ceiling(name: str, memory: str | None, models: Path, tmp_path: Path) -> None:
    check(models, tmp_path, name, memory, "virtual", workers=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shapes", "times"), [("square", 1), ("square", 1.5), ("square", 4), ("oblong", 1), ("oblong", 2)]
)
@pytest.mark.parametrize("name", OF_MODELS)
def test_every_method_stays_under_its_ceiling(
    name: str, shapes: str, times: float, models_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Ceilings are some times the smallest one that would do, which each method has of its own."""
    # A direct reader needs buffers of its own: under the smallest ceiling `auto` has to map, where it is asked to.
    for number, (reader, workers) in enumerate((("mmap", 4), ("auto" if times == 1 else "direct", 2))):
        folder = tmp_path / str(number)
        folder.mkdir()
        check(models_of(shapes), folder, name, None, "virtual", times, reader=reader, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linear", "ties", "tsv_m"])
def test_a_copied_store_stays_under_its_ceiling(name: str, models: Path, tmp_path: Path) -> None:
    check(models, tmp_path, name, None, "copy", workers=2)
    shutil.rmtree(tmp_path / "work")
    shutil.rmtree(tmp_path / "merged")
    check(models, tmp_path, name, "1GiB", "copy", workers=4)


def test_odd_offsets_stay_under_the_ceiling(tmp_path: Path) -> None:
    """Tensors that start at no multiple of eight can't be mapped: what is gathered instead is projected, too."""
    shapes = {"w": (8192, 2048)}
    write_job(tmp_path, shapes=shapes)
    for name in ("base", "expert-1", "expert-2"):
        path = tmp_path / name / "model.safetensors"
        header = encode_header([("odd", "U8", (1,)), ("w", "F16", shapes["w"])], {"format": "pt"})
        path.write_bytes(header + b"x" + path.read_bytes()[-2 * math.prod(shapes["w"]) :])
    need = int(smallest(tmp_path, workers=4).removesuffix("MiB"))
    work = build_job(tmp_path, memory=f"{need}MiB", chunk_size="8MiB", workers=4)
    assert peak(work, workers=4, reader="mmap")["peak"] <= need * MIB


def test_compiling_the_kernels_is_included(tmp_path: Path) -> None:
    write_job(tmp_path, shapes={"w": (64, 64)})
    work = build_job(tmp_path, memory="512MiB")
    assert peak(work, compile_anew=tmp_path / "cache", workers=1)["peak"] <= 256 * MIB, "reserved"


# ── a model of 70 billion parameters, of which only the headers exist ──

LAYERS, HIDDEN, INNER, WORDS = 80, 8192, 28672, 128256
LARGEST = {"lm_head.weight": (WORDS, HIDDEN)}


def shapes_70b() -> dict[str, tuple[int, ...]]:
    """Llama 3 70B."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (WORDS, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}mlp.{part}_proj.weight": (INNER, HIDDEN) for part in ("gate", "up")}
        found[f"{prefix}mlp.down_proj.weight"] = (HIDDEN, INNER)
        found |= {f"{prefix}self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qo"}
        found |= {f"{prefix}self_attn.{part}_proj.weight": (1024, HIDDEN) for part in "kv"}
        found |= {f"{prefix}{part}_layernorm.weight": (HIDDEN,) for part in ("input", "post_attention")}
    return found | {"model.norm.weight": (HIDDEN,), **LARGEST}


def write_holes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Checkpoints whose tensors are holes in sparse files: they read as zeros and take no disk."""
    header = encode_header([(name, "BF16", shape) for name, shape in shapes.items()], {"format": "pt"})
    size = len(header) + sum(2 * math.prod(shape) for shape in shapes.values())
    for name in ("base", "expert-1", "expert-2", "expert-3"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(header)
        os.truncate(folder / name / "model.safetensors", size)
        (folder / name / "config.json").write_text("{}")


@pytest.mark.parametrize("names", [["linear", "ties"], pytest.param(ELEMENTWISE, marks=pytest.mark.slow)])
def test_512_mib_plan_every_elementwise_method_of_70b(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = shapes_70b()
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (723, 70_553_706_496)
    try:
        write_holes(tmp_path, shapes)
    except OSError as error:
        pytest.skip(f"no sparse files of 141 GB here: {error}")
    monkeypatch.setattr("mergepipe.pipeline.build.check_room", lambda _: None)
    planned = []
    for name in names:
        work = tmp_path / name
        write_recipe(tmp_path, tmp_path, name)
        plan = mergepipe.build(tmp_path / "recipe.yaml", work=work, out=tmp_path / "out", memory="512MiB", workers=2)
        most = max(item.projected for item in scheduled(plan, 2))
        assert most <= 512 * MIB
        planned.append(f"{name} {most // MIB}")
        shutil.rmtree(work)
    print(f"70B at K=3 under 512 MiB, 2 workers, MiB projected: {', '.join(planned)}")


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_the_largest_tensor_runs_under_512_mib(reader: str, tmp_path: Path) -> None:
    write_holes(tmp_path, LARGEST)
    check(tmp_path, tmp_path, "ties", "512MiB", "virtual", reader=reader, workers=2)


GROUP_MIB = 352


@pytest.fixture
def limited(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of our own whose memory, file pages included, is limited to the ceiling."""
    version_1 = Path("/sys/fs/cgroup/memory")
    root = version_1 if version_1.is_dir() else Path("/sys/fs/cgroup")
    folder = root / f"mergepipe-test-{os.getpid()}"
    try:
        folder.mkdir()
        name = "memory.limit_in_bytes" if root == version_1 else "memory.max"
        (folder / name).write_text(str(GROUP_MIB * MIB))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield folder
    folder.rmdir()


def run_behind(first: str, memory: str, models: Path, folder: Path) -> None:
    """A TIES run under `memory`, in a shell that does `first` before it."""
    write_recipe(models, folder, "ties")
    work = build_job(folder, memory=memory, chunk_size="8MiB", workers=2)
    code = f"import mergepipe; print(mergepipe.run({str(work)!r}, workers=2).output)"
    command = f'{first} && exec {sys.executable} -c "$0"'
    done = subprocess.run(["sh", "-c", command, code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == folder / "merged"


def test_a_run_lives_in_a_control_group_of_its_ceiling(limited: Path, models: Path, tmp_path: Path) -> None:
    """The kernel kills what takes more, counting file pages too: there is no room for all 180 MB of them."""
    run_behind(f"echo $$ > {limited}/cgroup.procs", f"{GROUP_MIB}MiB", models, tmp_path)


def test_a_run_lives_under_ulimit(models: Path, tmp_path: Path) -> None:
    """RLIMIT_DATA bounds private writable memory, touched or not: a gigabyte, for what stacks and arenas reserve."""
    run_behind(f"ulimit -d {1024 * 1024}", "512MiB", models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["mmap", "direct"])
def test_rows_gathered_from_everywhere_stay_under_the_ceiling(tmp_path: Path, reader: str) -> None:
    """Two vocabularies in different orders, at the smallest ceiling: windows, row maps and tables of pieces count."""
    plain = [f"{first}{second}" for first in "abcdefghijklmnop" for second in "abcdefghijklmnop"]
    names = ["".join(letters) for letters in itertools.islice(itertools.product("abcdefghijklmnop", repeat=4), 30_000)]
    order = list(reversed(names))
    write_model(tmp_path / "base", byte_tokenizer([*plain, *names]), 0, dtype="bfloat16")
    write_model(tmp_path / "expert", byte_tokenizer([*plain, *order]), 1, dtype="bfloat16")
    listed = [{"model": str(tmp_path / "expert"), "parameters": {"weight": 0.5, "density": 0.5}}]
    recipe = {"merge_method": "ties", "base_model": str(tmp_path / "base"), "models": listed}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "tokenizer_source": "union"}))
    where: dict[str, Any] = {"work": tmp_path / "work", "out": tmp_path / "out", "workers": 2}
    with pytest.raises(MemoryBudgetError) as caught:
        mergepipe.build(tmp_path / "recipe.yaml", **where, memory="1MiB")
    least = re.search(r"--memory (\d+MiB)", str(caught.value))
    assert least is not None
    found = mergepipe.build(tmp_path / "recipe.yaml", **where, memory=least[1])
    assert found.vocabulary is not None
    assert found.vocabulary.gathers
    assert peak(tmp_path / "work", workers=2, reader=reader)["peak"] <= parse_bytes(least[1])
