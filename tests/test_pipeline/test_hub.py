"""Models by hub id, against a small hub of our own on the loopback device."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import yaml
from safetensors.torch import save_file

import mergepipe
from mergepipe.cli.main import main
from mergepipe.errors import CheckpointError, CheckpointNotFoundError
from mergepipe.pipeline.check import check
from mergepipe.pipeline.events import Announcer, DownloadProgress, Event, Note
from mergepipe.pipeline.hub import fetch, wanted_files
from mergepipe.pipeline.remote import FIRST_BYTES
from mergepipe.pipeline.summary import summarize
from support.checkpoints import read_tensors

hub = pytest.importorskip("huggingface_hub")

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class Hub(BaseHTTPRequestHandler):
    """Serves the folders ``ROOT/org/name/revision``, as far as huggingface_hub asks."""

    root: ClassVar[Path]
    asked: ClassVar[list[str]]
    sent: ClassVar[dict[str, int]]
    gated: ClassVar[set[str]] = set()
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._model("/".join(parts[2:4]), parts[5] if len(parts) > 5 else "main")
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._error(404, "EntryNotFound")

    def _folder(self, name: str, revision: str) -> Path | None:
        folder = self.root / name
        branch = next((branch for branch, commit in COMMITS.items() if revision in (branch, commit)), None)
        if name in self.gated:
            return self._error(403, "GatedRepo")
        if not folder.is_dir():
            return self._error(404, "RepoNotFound")
        if branch is None or not (folder / branch).is_dir():
            return self._error(404, "RevisionNotFound")
        return folder / branch

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _model(self, name: str, revision: str) -> None:
        folder = self._folder(name, revision)
        if folder is not None:
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files]
            sha = COMMITS[folder.name]
            self._send(200, json.dumps({"id": name, "modelId": name, "sha": sha, "siblings": siblings}).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        folder = self._folder(name, revision)
        if folder is None:
            return
        if not (folder / file).is_file():
            self._error(404, "EntryNotFound")
            return
        data = (folder / file).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMITS[folder.name]}
        start, stop = 0, len(data)
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = int(first), min(stop, int(last) + 1 if last else stop)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        if self.command == "GET":
            self.sent[file] = self.sent.get(file, 0) + stop - start
        self._send(206 if wanted else 200, data[start:stop], headers | {"Accept-Ranges": "bytes"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The root of a hub that huggingface_hub now talks to; an empty cache."""
    Hub.root, Hub.asked, Hub.sent, Hub.gated = tmp_path / "hub", [], {}, set()
    Hub.root.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    constants = hub.constants
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield Hub.root
    server.shutdown()
    thread.join()
    server.server_close()


def put(root: Path, name: str, value: float, branch: str = "main", *, sharded: bool = False) -> None:
    """A model of two tensors, and what else a repository holds."""
    folder = root / name / branch
    (folder / "onnx").mkdir(parents=True)
    tensors = {"a": torch.full((4, 4), float(value)), "b": torch.full((8,), float(value))}
    if sharded:
        for number, key in enumerate(tensors):
            save_file({key: tensors[key]}, folder / f"model-0000{number + 1}-of-00002.safetensors")
        weight_map = {key: f"model-0000{i + 1}-of-00002.safetensors" for i, key in enumerate(tensors)}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        save_file(tensors, folder / "consolidated.safetensors")
    else:
        save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "toy"}')
    (folder / "tokenizer.model").write_bytes(b"t")
    for other in ("pytorch_model.bin", "README.md", "train.py", "onnx/model.onnx"):
        (folder / other).write_bytes(b"not wanted")


def merge(folder: Path, base: str, fine: str) -> tuple[dict[str, torch.Tensor], list[Event], Any]:
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1}} for name in (base, fine)],
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    events: list[Event] = []
    plan = mergepipe.build(folder / "r.yaml", folder / "w", out=folder / "out", on_event=events.append)
    mergepipe.run(folder / "w")
    return read_tensors(folder / "out"), events, plan


def test_a_merge_of_hub_ids(served: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Revisions are settled and pinned, only what is needed is fetched, the size is told first, nothing is printed."""
    put(served, "org/base", 1, sharded=True)
    put(served, "org/fine", 9)
    put(served, "org/fine", 3, "v1")
    found, events, plan = merge(tmp_path, "org/base", "org/fine@v1")
    assert all(bool((value == 2).all()) for value in found.values())
    assert [Path(model.path).name for model in plan.models] == [COMMITS["main"], COMMITS["v1"]]
    got = {path.rpartition("/")[2] for path in Hub.asked if path.startswith("GET") and "/resolve/" in path}
    assert got == {
        "config.json", "tokenizer.model", "model.safetensors", "model.safetensors.index.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
    }  # fmt: skip
    notes = [event.text for event in events if isinstance(event, Note)]
    assert any(
        f"'org/fine@v1' is commit {COMMITS['v1']}: 3 files" in note and "to be downloaded" in note for note in notes
    )
    assert any(isinstance(event, DownloadProgress) for event in events)
    record = json.loads((tmp_path / "out" / "mergepipe_manifest.json").read_text(encoding="utf-8"))
    assert [one["model"] for one in record["inputs"]] == [f"org/base@{COMMITS['main']}", f"org/fine@{COMMITS['v1']}"]
    assert "base_model:\n- org/base\n- org/fine" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"t"
    assert capfd.readouterr() == ("", "")


def test_a_folder_wins(served: Path, tmp_path: Path) -> None:
    for name in ("base", "fine"):
        folder = Path("org") / name
        folder.mkdir(parents=True)
        save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    merge(tmp_path, "org/base", "org/fine")
    assert Hub.asked == []


def test_the_second_time_nothing_is_fetched_and_offline_the_cache_serves(
    served: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(served, "org/base", 1)
    events: list[Event] = []
    first = fetch("org/base", Announcer(None))
    Hub.asked.clear()
    assert fetch("org/base", Announcer(events.append)) == first
    assert [path for path in Hub.asked if path.startswith("GET") and "/resolve/" in path] == []
    assert " 0 of them to be downloaded" in events[0].text  # type: ignore[union-attr]
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    Hub.asked.clear()
    assert fetch("org/base", Announcer(events.append)) == first
    assert Hub.asked == []
    assert "taken from the cache" in events[-1].text  # type: ignore[union-attr]
    with pytest.raises(CheckpointNotFoundError, match=r"'org/other' is no folder, is not in the cache.*HF_HUB_OFFLINE"):
        fetch("org/other", Announcer(None))


def test_a_download_goes_on(served: Path, tmp_path: Path) -> None:
    """What an interrupted download has left is not fetched again."""
    put(served, "org/base", 1)
    data = (served / "org/base/main/model.safetensors").read_bytes()
    etag = hashlib.sha256(data).hexdigest()
    blobs = tmp_path / "cache" / "models--org--base" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{etag}.incomplete").write_bytes(data[:100])
    folder = fetch("org/base", Announcer(None))
    assert (folder / "model.safetensors").read_bytes() == data


BIG = 400_000
"""Bytes of a tensor that dwarfs every header."""


def put_big(root: Path, name: str, shape: tuple[int, ...] = (BIG // 4,), extra: int = 0) -> None:
    """A model of two shards; with `extra`, that many small tensors, which make for a long header."""
    folder = root / name / "main"
    folder.mkdir(parents=True)
    more = {f"extra.{number:04}.weight": torch.zeros(1) for number in range(extra)}
    for file, tensors in (("1", {"a": torch.ones(shape), **more}), ("2", {"b": torch.ones(BIG // 4)})):
        save_file(tensors, folder / f"{file}.safetensors")
    weight_map = {"a": "1.safetensors", "b": "2.safetensors"} | dict.fromkeys(more, "1.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text('{"model_type": "toy"}')


def recipe_of(*names: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": n, "parameters": {"weight": 1}} for n in names]}


def test_a_check_fetches_headers_only(served: Path, tmp_path: Path) -> None:
    """Of the weights a few bytes; what it says of the merge is what `build` says after the download."""
    put_big(served, "org/base", extra=3000)
    put_big(served, "org/fine", extra=3000)
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_of("org/base", "org/fine")))
    checked = check(tmp_path / "r.yaml", tmp_path / "w")
    assert checked.faults == ()
    sent = {file: size for file, size in Hub.sent.items() if file.endswith(".safetensors")}
    header = int.from_bytes((served / "org/base/main/1.safetensors").read_bytes()[:8], "little")
    assert header > FIRST_BYTES
    assert sent == {"1.safetensors": 2 * (header + 8), "2.safetensors": 2 * FIRST_BYTES}
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert any("to be downloaded" in note for note in checked.notes)
    plan = mergepipe.build(tmp_path / "r.yaml", tmp_path / "w")
    told = [
        {k: v for k, v in summarize(one).items() if k not in ("id", "models")} for one in (checked.plan, plan) if one
    ]
    assert len(told) == 2
    assert told[0] == told[1]
    Hub.sent.clear()
    assert check(tmp_path / "r.yaml", tmp_path / "w2").plan == plan
    assert not [file for file in Hub.sent if file.endswith(".safetensors")]


def test_inspecting_fetches_headers_only(served: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put_big(served, "org/base", extra=100)
    assert main(["inspect", "org/base", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (found["path"], len(found["tensors"])) == ("org/base", 102)
    assert all(size <= FIRST_BYTES for file, size in Hub.sent.items() if file.endswith(".safetensors"))


def test_a_check_from_afar_finds_what_is_wrong(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shape, a file cut off on the hub, and too little room for the download."""
    put_big(served, "org/base")
    put_big(served, "org/wide", (BIG // 8, 2))
    put_big(served, "org/cut")
    path = served / "org/cut/main/2.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("org/base", "org/wide")))
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: usage._replace(free=1_500_000))
        faults = {fault.kind: fault.message for fault in check(recipe, tmp_path / "w").faults}
    assert "'a' is (100000,)" in faults["checkpoint"]
    assert "(50000, 2)" in faults["checkpoint"]
    assert "the download of 'org/base'" in faults["disk"]
    recipe.write_text(yaml.safe_dump(recipe_of("org/base", "org/cut")))
    (fault,) = check(recipe, tmp_path / "w").faults
    assert "2.safetensors" in fault.message
    assert "truncated" in fault.message


def test_a_check_of_pytorch_files_downloads_them(served: Path, tmp_path: Path) -> None:
    """And says so: they have no header that could be read alone."""
    folder = served / "org" / "old" / "main"
    folder.mkdir(parents=True)
    torch.save({"a": torch.ones(3)}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text("{}")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe_of("org/old")))
    checked = check(tmp_path / "r.yaml", tmp_path / "w")
    assert checked.faults == ()
    assert any("can't be looked at without a download" in note for note in checked.notes)


def test_what_the_hub_refuses(served: Path) -> None:
    """Each with the contract's exit code 4 and what to do."""
    put(served, "org/base", 1)
    Hub.gated.add("org/secret")
    (served / "org" / "empty" / "main").mkdir(parents=True)
    for name, words in (
        ("org/nothing", "the hub has no such model"),
        ("org/base@v9", "'org/base' has no revision 'v9'"),
        ("org/secret", "is gated: accept its terms"),
        ("org/empty", r"has no weights: no \*\.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=words) as caught:
            fetch(name, Announcer(None))
        assert caught.value.exit_code == 4


def test_what_is_wanted_of_a_repository() -> None:
    """Safetensors before PyTorch files, an adapter's own files, no code and no other formats."""
    names = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "tokenizer.json", "x.py"]
    sizes = dict.fromkeys(names, 1)
    get: Any = None
    weights = ["adapter_model.safetensors"]
    assert wanted_files(sizes, get, "o/n") == (["adapter_config.json", "tokenizer.json", *weights], weights)
    sizes = dict.fromkeys(["pytorch_model.bin", "training_args.bin", "config.json", "flax_model.msgpack"], 1)
    assert wanted_files(sizes, get, "o/n") == (["config.json", "pytorch_model.bin"], ["pytorch_model.bin"])


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointNotFoundError, match=r"'org/name' is no folder; .* install mergepipe\[hub\]"):
        fetch("org/name", Announcer(None))
