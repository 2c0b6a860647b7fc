"""Rows measured and scored through torch are those of the CPU's kernels, to the bit, on every device there is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load_file, save_file

import mergepipe
from mergepipe.errors import Interrupted, MemoryBudgetError, NonFiniteError, WorkspaceError
from mergepipe.pipeline import devices, scoring
from mergepipe.tasks import exponentials, points, rows, rows_torch, scores, select
from mergepipe.tasks.blocks import block_elements
from mergepipe.tasks.method import Accumulator, Array, Tile, can_offload
from support.drive import load_tile, make_job
from support.gpu import on_every_device
from support.jobs import hashes

A = np.array([[-0.5, -0.2, 0.1, 0.4], [0.0, 0.4, -0.3, 0.1], [0.5, -0.1, 0.4, -0.2]])
B = np.array([[-0.62, -0.18, 0.0, 0.44], [-0.06, 0.5, -0.3, 0.0], [0.5, -0.18, 0.5, -0.18]])
DIRECTIONS = [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in a run; small operations are not faster on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def same_bits(found: Array, expected: Array) -> None:
    kind = f"u{expected.dtype.itemsize}"
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(kind), np.ascontiguousarray(expected).view(kind))


def pair(shape: tuple[int, int], work: str, step: float) -> tuple[Array, Array]:
    """Rows that differ a little or a lot; one that does not differ, one that moved as a whole, odd values."""
    rng = np.random.default_rng(len(work) + shape[1])
    a = rng.normal(0, 0.02, shape).astype(work)
    b = (a + rng.normal(0, step, shape).astype(work) * (rng.random(shape) < 0.9)).astype(work)
    odd = np.array([0.0, -0.0, np.finfo(work).smallest_subnormal, 0.5], work)
    for v in (a, b):
        flat = v.reshape(-1)[::7]
        flat[:] = np.resize(odd, flat.size)
    if shape[0] > 4:
        b[2], b[3] = a[2], a[3] + a.dtype.type(0.25)
    return a, b


def on(device: str, values: Array) -> torch.Tensor:
    return torch.from_numpy(values.copy()).to(device)


@on_every_device
def test_the_exponential(device: str) -> None:
    x = np.concatenate(
        [np.linspace(-700, 700, 4001), np.geomspace(1e-300, 1, 99), -np.geomspace(1e-300, 1, 99), [-0.0]]
    )
    expected = np.array([exponentials.grow((v, v, v, v)) for v in x.tolist()])
    for number, part in enumerate(rows_torch.grow(on(device, x))):
        same_bits(part.cpu().numpy(), expected[:, number, 0])
    expected = np.array([exponentials.exp((v, v, v, v))[0] for v in x.tolist()])
    same_bits(rows_torch.exp(on(device, x)).cpu().numpy(), expected)


@on_every_device
@pytest.mark.parametrize("step", [1e-3, 0.3, 300.0])
@pytest.mark.parametrize("work", ["f4", "f8"])
@pytest.mark.parametrize("shape", [(5, 300), (7, 4096), (16, 1001), (40, 33), (3, 1), (20, 64), (1, 9000)], ids=str)
def test_bits_are_those_of_the_kernels(shape: tuple[int, int], work: str, step: float, device: str) -> None:
    a, b = pair(shape, work, step)
    there, other = on(device, a), on(device, b)
    for directions in DIRECTIONS:
        expected = np.empty((shape[0], 3))
        energy = rows.measure_rows(a.ravel(), b.ravel(), shape[1], *directions, expected)
        found, squares = rows_torch.measure_rows(there, other, *directions)
        same_bits(found, expected)
        assert rows_torch.block_energies(squares, shape[0]).tolist() == [energy]
        statistics = on(device, expected)
        for always in (False, True):
            delta, pointwise = np.empty_like(a).ravel(), np.empty_like(a).ravel()
            scores.score_delta(a.ravel(), b.ravel(), shape[1], expected, always, delta)
            points.score_points(a.ravel(), b.ravel(), shape[1], expected, *directions, always, pointwise)
            own = rows_torch.score_delta(there, other, statistics[:, 0], always)
            same_bits(own.cpu().numpy().ravel(), delta)
            own = rows_torch.score_points(there, other, statistics, *directions, always)
            same_bits(own.cpu().numpy().ravel(), pointwise)
            counted, counts = np.zeros(select.TOP_BINS, np.int64), np.zeros(select.TOP_BINS, np.int64)
            select.count_top(pointwise, counted)
            rows_torch.count_top(own, counts)
            np.testing.assert_array_equal(counts, counted)


@on_every_device
@pytest.mark.parametrize("width", [63, 64, 300, 512, 4097])
def test_bits_of_close_rows(width: int, device: str) -> None:
    """Rows that are close, some beside them that are not, and some that moved as a whole."""
    rng = np.random.default_rng(width)
    a = rng.normal(0, 0.02, (12, width)).astype("f4")
    b = (a + rng.normal(0, 1e-3, a.shape)).astype("f4")
    b[1], b[2], a[3], b[4] = a[1], a[2] + np.float32(0.01), a[3] + 1, b[4] + np.float32(0.02)
    a[5, 7], b[6, 7] = -1.0, 0.2
    for chosen in (slice(None), [0, 1, 5], [3, 6]):
        x, y = np.ascontiguousarray(a[chosen]), np.ascontiguousarray(b[chosen])
        for directions in DIRECTIONS:
            expected = np.empty((len(x), 3))
            energy = rows.measure_rows(x.ravel(), y.ravel(), width, *directions, expected)
            found, squares = rows_torch.measure_rows(on(device, x), on(device, y), *directions)
            same_bits(found, expected)
            assert rows_torch.block_energies(squares, len(x)).tolist() == [energy]


@on_every_device
@pytest.mark.parametrize("width", [5, 64, 300, 4097])
def test_bits_of_rows_of_every_kind(width: int, device: str) -> None:
    rng = np.random.default_rng(width)
    sizes = [(x, y) for x in (0.3, 3.0, 15.0, 60.0, 250.0, 700.0) for y in (0.02, 0.11, 0.5, 20.0, 700.0)]
    reach, largest = (np.array(side)[:, None] for side in zip(*sizes, strict=True))
    shape = (len(sizes), width)
    a = (np.clip(rng.normal(0, 0.3, shape), -1, 1) * reach).astype("f4")
    b = (a + np.clip(rng.normal(0, 0.3, shape), -1, 1) * largest).astype("f4")
    for directions in DIRECTIONS:
        expected, scored = np.empty((len(a), 3)), np.empty_like(a).ravel()
        rows.measure_rows(a.ravel(), b.ravel(), width, *directions, expected)
        same_bits(rows_torch.measure_rows(on(device, a), on(device, b), *directions)[0], expected)
        points.score_points(a.ravel(), b.ravel(), width, expected, *directions, False, scored)
        own = rows_torch.score_points(on(device, a), on(device, b), on(device, expected), *directions, False)
        same_bits(own.cpu().numpy().ravel(), scored)


@on_every_device
def test_huge_weights(device: str) -> None:
    """Differences that overflow, rows that are far apart."""
    a = np.array([[3e38, 0, -3e38, 1], [1e4, -1e4, 0, 0], [0, 0, 0, 0], [3e38, -3e38, 0, 0]], "f4")
    b = np.array([[3e38, 1, -3e38, 0], [-1e4, 1e4, 0, 1], [3e38, -3e38, 1, 2], [-3e38, 3e38, 0, 0]], "f4")
    expected, by_row = np.empty((4, 3)), np.empty(16, "f4")
    with np.errstate(over="ignore"):
        rows.measure_rows(a.ravel(), b.ravel(), 4, 1.0, 0.0, expected)
        scores.score_delta(a.ravel(), b.ravel(), 4, expected, False, by_row)
    found, _ = rows_torch.measure_rows(on(device, a), on(device, b), 1.0, 0.0)
    same_bits(found[:, 0], expected[:, 0])
    found_scores = rows_torch.score_delta(on(device, a), on(device, b), on(device, expected[:, 0]), False)
    same_bits(found_scores.cpu().numpy().ravel(), by_row)


class Watched(rows_torch.Scorer):
    """Who has tiles in hand, and with them windows of the reader, must not wait for a lane."""

    reading = False

    def read(self, tiles: list[Tile]) -> Iterator[Tile]:
        self.reading = True
        yield from tiles
        self.reading = False

    def lane(self) -> AbstractContextManager[rows_torch.Lane]:
        assert not self.reading
        return super().lane()


def sweep(device: str | None, donors: list[Array], a: Array, params: dict[str, Any]) -> dict[str, Array]:
    """The state after the sweeps that a device can help with, by tile or with the help of a device."""
    method, job = make_job("scf_rkl", a.shape, a.dtype, [{} for _ in donors], params)
    state: dict[str, Array] = {}
    tiles = [load_tile(method, job, donors, a, index) for index in range(job.blocks)]
    for reduction in method.reductions(job):
        counts, row = reduction.shapes(job)
        total = Accumulator(
            None if counts is None else np.zeros(counts, np.int64),
            None if row is None else np.zeros((job.blocks, *row)),
        )
        if not reduction.needed(job, state):
            continue
        if device is not None and can_offload(reduction):
            nbytes = rows_torch.lane_bytes(len(donors) + 1, block_elements(a.shape), a.dtype.itemsize)
            scorer = Watched(device, nbytes)
            reduction.offload(job, state, total, scorer.read(tiles), scorer)
        else:
            for tile in tiles:
                reduction.update(job, state, total, tile)
        state |= reduction.combine(job, state, total)
    return state


@on_every_device
@pytest.mark.parametrize("multi", ["winner", "fold"])
@pytest.mark.parametrize("importance", ["delta_kl", "pointwise"])
@pytest.mark.parametrize(
    ("shape", "staged"),
    [((), 1), ((9,), 1), ((40, 1), 1), ((3, 70, 900), 1), ((33, 4000), 2**21), ((33, 4000), rows_torch.STAGED_BYTES)],
    ids=str,
)
def test_a_sweep_leaves_the_same_state(
    shape: tuple[int, ...], importance: str, multi: str, device: str, staged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a batch is a single block, a few of them with a shorter last one, or everything."""
    monkeypatch.setattr(rows_torch, "STAGED_BYTES", staged)
    rng = np.random.default_rng(1)
    a = np.asarray(rng.normal(0, 0.02, shape), "f4")
    donors = [np.asarray(a + np.round(rng.normal(0, 1e-3, shape) * 4096) / 4096, "f4") for _ in range(3)]
    params = {"importance": importance, "multi": multi, "zero_kl": "abs", "quantile": 0.7}
    expected, found = sweep(None, donors, a, params), sweep(device, donors, a, params)
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@on_every_device
@pytest.mark.parametrize("params", [{"quantile": 0.5}, {"quantile": 0.5, "importance": "pointwise"}])
def test_the_printed_vectors(device: str, params: dict[str, Any]) -> None:
    state = sweep(device, [B], A, params)
    expected = sweep(None, [B], A, params)
    assert state["thresholds"].tobytes() == expected["thresholds"].tobytes()
    np.testing.assert_allclose(state["_rows_0"][0, :, 0], [0.0024026359, 0.0034334185, 0.0019697908], atol=5.1e-11)


# -- through build and run

SHAPES = {"a.weight": (130, 1000), "b.wide": (2, 66_001), "c.bias": (301,), "d.experts": (3, 5, 40), "e.scale": ()}


def write(folder: Path, **extra: Any) -> Path:
    for number in range(3):
        target = folder / f"model-{number}"
        target.mkdir(parents=True)
        rng, parent = np.random.default_rng(number), np.random.default_rng(0)
        step = 0.002 if number else 0.0
        tensors = {
            name: (parent.normal(0, 0.02, shape) + step * rng.normal(0, 1, shape)).astype(np.float16)
            for name, shape in SHAPES.items()
        }
        save_file({name: np.asarray(value) for name, value in tensors.items()}, target / "model.safetensors")
        (target / "config.json").write_text('{"model_type": "tiny"}')
    recipe = {
        "merge_method": "scf_rkl", "base_model": str(folder / "model-0"),
        "models": [{"model": str(folder / f"model-{number}")} for number in (1, 2)], **extra,
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def build(folder: Path, name: str = "one", **how: Any) -> Path:
    mergepipe.build(folder / "recipe.yaml", work=folder / name, out=folder / f"{name}-out", **how)
    return folder / name


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows go through torch, on a GPU if there is one, else on a CPU that stands in for it."""
    device = "cuda:0" if torch.cuda.is_available() else "cpu:0"
    known = devices._is_there
    monkeypatch.setattr(devices, "_named", lambda asked: device if asked == "cuda" else asked)
    monkeypatch.setattr(devices, "_is_there", lambda asked: asked == device or known(asked))
    return device


@pytest.mark.parametrize(
    "extra",
    [{}, {"parameters": {"importance": "pointwise", "multi": "fold"}}, {"scope": "model"}],
    ids=["winner", "fold", "model"],
)
def test_a_merge_is_the_same_on_every_device(extra: dict[str, Any], by_torch: str, tmp_path: Path) -> None:
    folder = write(tmp_path, **extra)
    mergepipe.run(build(folder), device="cpu")
    expected = hashes(folder / "one-out")
    ways = [{}, {"chunk_size": "64KiB"}]
    for number, how in enumerate(ways):
        result = mergepipe.run(build(folder, f"w{number}", **how), device="cuda", memory="3GiB", workers=3)
        assert hashes(folder / f"w{number}-out") == expected
        assert result.manifest["device"] == by_torch
        assert "torch" in result.manifest["versions"]
        where = {name: found["device"] for name, found in result.manifest["tensors"].items()}
        assert where["a.weight"] == by_torch
        assert where["b.wide"] == "cpu"


def test_another_device_is_refused(by_torch: str, tmp_path: Path) -> None:
    work = build(write(tmp_path))
    for begun, other in (("cuda", "cpu"), ("cpu", "cuda")):
        stop = threading.Event()
        stop.set()
        with pytest.raises(Interrupted):
            mergepipe.run(work, stop=stop, device=begun, memory="3GiB")
        with pytest.raises(WorkspaceError, match="was begun with --device"):
            mergepipe.run(work, device=other, memory="3GiB")
        if begun == "cuda":
            with pytest.raises(MemoryBudgetError):
                mergepipe.run(work, memory="512MiB")  # goes on with the device, and that takes memory
            mergepipe.run(work, memory="3GiB", restart=True, stop=None, device="cpu")
            work = build(tmp_path, "two")
    assert mergepipe.run(work).manifest["device"] == "cpu"


def test_a_device_is_only_taken_where_the_ceiling_has_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(scoring, "GPU_FILES", (str(tmp_path),))
    monkeypatch.setattr(devices, "_best", lambda: str(chosen.append(1) or "cpu"))
    work = build(write(tmp_path))
    assert mergepipe.run(work, memory="512MiB").manifest["device"] == "cpu"
    assert not chosen
    mergepipe.run(build(tmp_path, "two"), memory="3GiB")
    assert chosen


def test_what_is_not_finite_is_named(by_torch: str, tmp_path: Path) -> None:
    folder = write(tmp_path)
    path = folder / "model-1" / "model.safetensors"
    values = load_file(path)
    values["a.weight"][7, 5] = np.inf
    save_file(values, path)
    with pytest.raises(NonFiniteError, match=r"a.weight.*model-1.*element 7,005"):
        mergepipe.run(build(folder), device="cuda", memory="3GiB")
