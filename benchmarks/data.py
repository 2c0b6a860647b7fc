"""Checkpoints to measure with: a base and experts in the layout of a Llama, streamed to disk with little memory.

Weights are normal with standard deviation 0.02, experts differ from the base by 0.001, as fine-tunes do; everything is
rounded to bfloat16. Two shards with an index, a config that transformers and mergekit accept, no tokenizer.

    python -m benchmarks.data FOLDER --size 0.5B --experts 3
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import click
import ml_dtypes
import numpy as np
import numpy.typing as npt

PIECE = 1 << 20
"""Elements generated at a time."""


@dataclass(frozen=True)
class Layout:
    """The sizes of a Llama-like model.

    Attributes
    ----------
    hidden, intermediate, layers, vocabulary : int
    heads, kv_heads : int
        Attention heads; each is ``hidden / heads`` wide.
    """

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    heads: int
    kv_heads: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor by name, in the order in which `save_pretrained` writes them."""
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (self.vocabulary, h)}
        shapes["model.embed_tokens.weight"] = (self.vocabulary, h)
        for layer in range(self.layers):
            one = {
                "input_layernorm": (h,),
                "mlp.down_proj": (h, self.intermediate),
                "mlp.gate_proj": (self.intermediate, h),
                "mlp.up_proj": (self.intermediate, h),
                "post_attention_layernorm": (h,),
                "self_attn.k_proj": (kv, h),
                "self_attn.o_proj": (h, h),
                "self_attn.q_proj": (h, h),
                "self_attn.v_proj": (kv, h),
            }
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in one.items()}
        return shapes | {"model.norm.weight": (h,)}

    @property
    def parameters(self) -> int:
        """How many numbers a model has."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def config(self) -> dict[str, Any]:
        """What belongs into config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


LAYOUTS = {
    "1M": Layout(128, 384, 4, 1000, 4, 2),
    "4M": Layout(256, 768, 4, 2000, 4, 2),
    "10M": Layout(256, 768, 2, 16_500, 4, 2),
    "0.1B": Layout(768, 2048, 10, 16_000, 12, 4),
    "0.25B": Layout(1024, 2816, 16, 32_000, 16, 8),
    "0.3B": Layout(1280, 3456, 12, 32_000, 10, 5),
    "0.5B": Layout(1536, 4096, 16, 32_000, 12, 4),
    "1B": Layout(2048, 5632, 22, 32_000, 32, 4),
    "2B": Layout(2560, 6912, 26, 32_000, 20, 5),
    "7B": Layout(4096, 11_008, 32, 32_000, 32, 32),
    "70B": Layout(8192, 28_672, 80, 128_256, 64, 8),
    "405B": Layout(16_384, 53_248, 126, 128_256, 128, 8),
}
"""Known sizes by name; the last three are for header-only files: Llama 2 7B, Llama 3 70B, Llama 3.1 405B."""


def write_checkpoints(folder: Path, layout: Layout, experts: int = 3, seed: int = 0) -> list[Path]:
    """Write ``base``, ``expert-1``, ... under `folder`, all at once and in pieces.

    Returns
    -------
    list of Path
        The base first.
    """
    folders = [folder / "base", *(folder / f"expert-{i + 1}" for i in range(experts))]
    shards = split(layout.shapes, 2)
    for path in folders:
        write_small_files(path, layout.config, shards, itemsize=2)
    draw = np.random.Generator(np.random.SFC64(seed))
    for number, shard in enumerate(shards):
        with ExitStack() as stack:
            files = [stack.enter_context((path / shard_name(number, len(shards))).open("wb")) for path in folders]
            for file in files:
                file.write(header(shard, "BF16", 2))
            for shape in shard.values():
                _write_tensor(files, shape, draw)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
    return folders


def write_matrices(
    folder: Path, shape: tuple[int, int], experts: int, seed: int = 0, count: int = 1, spread: float = 0.0
) -> list[Path]:
    """Write ``base``, ``expert-1``, ... that hold some matrices each, all at once and in pieces.

    With a `spread` the rows of an expert have moved more and less: it is the standard deviation of the logarithm.

    Returns
    -------
    list of Path
        The base first.
    """
    folders = [folder / "base", *(folder / f"expert-{i + 1}" for i in range(experts))]
    shapes: dict[str, tuple[int, ...]] = {f"model.layers.{n}.mlp.down_proj.weight": shape for n in range(count)}
    for path in folders:
        write_small_files(path, {"model_type": "llama"}, [shapes], itemsize=2)
    with ExitStack() as stack:
        files = [stack.enter_context((path / shard_name(0, 1)).open("wb")) for path in folders]
        for file in files:
            file.write(header(shapes, "BF16", 2))
        draw = np.random.Generator(np.random.SFC64(seed))
        for _ in range(count):
            _write_tensor(files, shape, draw, spread)
    return folders


def _write_tensor(
    files: Sequence[BinaryIO], shape: tuple[int, ...], draw: np.random.Generator, spread: float = 0.0
) -> None:
    size, width = math.prod(shape), shape[-1]
    rows = (
        np.exp(draw.standard_normal((len(files), size // width), np.float32) * np.float32(spread)) if spread else None
    )
    for start in range(0, size, PIECE):
        count = min(size - start, PIECE)
        base = _rounded(draw.standard_normal(count, np.float32) * np.float32(0.02))
        files[0].write(base.tobytes())
        for number, file in enumerate(files[1:]):
            delta = draw.standard_normal(count, np.float32) * np.float32(0.001)
            if rows is not None:
                delta *= rows[number][np.arange(start, start + count) // width]
            file.write(_rounded(base.astype(np.float32) + delta).tobytes())


def _rounded(values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    return values.astype(ml_dtypes.bfloat16)


def write_headers_only(folder: Path, shapes: dict[str, tuple[int, ...]], models: int, shards: int) -> list[Path]:
    """Write checkpoints whose data is a hole: real headers and sizes, hardly a byte on disk.

    They are for planning only; a run would read zeros.
    """
    folders = [folder / f"model-{i}" for i in range(models)]
    groups = split(shapes, shards)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    for path in folders:
        write_small_files(path, config, groups, itemsize=2)
        for number, shard in enumerate(groups):
            raw = header(shard, "BF16", 2)
            with (path / shard_name(number, len(groups))).open("wb") as file:
                file.write(raw)
                file.truncate(len(raw) + 2 * sum(math.prod(shape) for shape in shard.values()))
    return folders


def split(shapes: dict[str, tuple[int, ...]], count: int) -> list[dict[str, tuple[int, ...]]]:
    """Cut the tensors into `count` shards of about equal bytes, in order; fewer if there are fewer tensors."""
    total = sum(math.prod(shape) for shape in shapes.values())
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        if shards[-1] and filled >= total * len(shards) / count:
            shards.append({})
        shards[-1][name] = shape
        filled += math.prod(shape)
    return shards


def shard_name(number: int, count: int) -> str:
    """The file name of shard `number` (from 0) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def header(shapes: dict[str, tuple[int, ...]], dtype: str, itemsize: int, align: int = 8) -> bytes:
    """The first bytes of a safetensors file with these tensors; their data begins at a multiple of `align`."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + itemsize * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % align)
    return len(raw).to_bytes(8, "little") + raw


def write_small_files(
    folder: Path, config: dict[str, Any], shards: list[dict[str, tuple[int, ...]]], itemsize: int
) -> None:
    """Make the folder with config.json and, for several shards, the index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    if len(shards) > 1:
        total = itemsize * sum(math.prod(shape) for shard in shards for shape in shard.values())
        where = {name: shard_name(i, len(shards)) for i, shard in enumerate(shards) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def weight_files(folders: list[Path]) -> list[Path]:
    """Every safetensors file in these folders."""
    return [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]


def drop_from_cache(files: list[Path]) -> None:
    """Ask the kernel to forget the cached pages of these files, which must be written out already."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def size_option(default: str) -> Callable[[Any], Any]:
    """The ``--size`` option of a benchmark."""
    return click.option("--size", type=click.Choice(list(LAYOUTS)), default=default, show_default=True)


def sizes() -> Iterator[str]:
    """One line about each known layout."""
    for name, layout in LAYOUTS.items():
        yield f"{name:>6}: {layout.parameters / 1e9:7.3f} B parameters, {len(layout.shapes)} tensors"


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@size_option("0.5B")
@click.option("--experts", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(folder: Path, size: str, experts: int, seed: int) -> None:
    """Write a base and experts into FOLDER and leave them there."""
    for path in write_checkpoints(folder, LAYOUTS[size], experts, seed):
        click.echo(path)


if __name__ == "__main__":
    main()
