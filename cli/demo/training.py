"""What both families share: tasks, the fitting of heads and bodies, and accuracy.

The base has one head over the classes of all tasks in a row. An expert takes the rows of its own task as its head,
which then stays as it is while the body is fine-tuned under it, as experts of CLIP do with their text embeddings. So
the base has an accuracy of its own on every task, and every body, merged or not, can be judged under every task's head.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import Tensor
from torch.nn import functional

Array = npt.NDArray[Any]

BATCH = 32


@dataclass(frozen=True, slots=True)
class Split:
    """Examples with their labels.

    Attributes
    ----------
    inputs : ndarray, shape (examples, ...)
        Images (float32, examples x 1 x height x width) or characters (int64, examples x length).
    labels : int64 ndarray, shape (examples,)
    """

    inputs: Array
    labels: Array


@dataclass(frozen=True, slots=True)
class Task:
    """One classification task.

    Attributes
    ----------
    name : str
    classes : tuple of str
    first : int
        Where its classes begin among those of the base's head.
    train, valid, test : Split
        `valid` chooses scales; `test` is only ever reported.
    """

    name: str
    classes: tuple[str, ...]
    first: int
    train: Split
    valid: Split
    test: Split


@dataclass(frozen=True, slots=True)
class Family:
    """A base and its experts on disk, and the tasks to judge them by.

    Attributes
    ----------
    name, title : str
        Folder name, and a line for the reader.
    model_class : type
        The transformers class that loads each of them.
    base : Path
        The common ancestor, a Hugging Face style folder.
    experts : mapping of str to Path
        One folder per task, in the order of `tasks`.
    tasks : tuple of Task
    """

    name: str
    title: str
    model_class: Any
    base: Path
    experts: Mapping[str, Path]
    tasks: tuple[Task, ...]


def cut(name: str, classes: Sequence[str], first: int, inputs: Array, labels: Array, held_out: int) -> Task:
    """A task of shuffled examples cut into train, valid and test; the last two have `held_out` examples each."""
    stops = (0, len(labels) - 2 * held_out, len(labels) - held_out, len(labels))
    train, valid, test = (Split(inputs[a:b], labels[a:b].astype(np.int64)) for a, b in itertools.pairwise(stops))
    return Task(name, tuple(classes), first, train, valid, test)


def spoil(task: Task, change: Callable[[Array, np.random.Generator], Array], seed: int) -> Task:
    """The same task with `change` applied to every input: harder conditions than the base was trained in."""
    rng = np.random.default_rng(seed)
    parts = (Split(change(split.inputs, rng), split.labels) for split in (task.train, task.valid, task.test))
    return Task(task.name, task.classes, task.first, *parts)


def head_of(model: Any) -> torch.nn.Linear:
    """The classification head: `classifier` in a ViT, `score` in a Llama."""
    head = getattr(model, "classifier", None) or model.score
    assert isinstance(head, torch.nn.Linear), "both architectures end in one linear layer"
    return head


def accuracy(model: Any, split: Split) -> float:
    """Share of examples whose class `model` gets right, from 0 to 1."""
    with torch.inference_mode():
        guesses = [model(inputs).logits.argmax(-1) for inputs in torch.split(torch.from_numpy(split.inputs), 256)]
    return float(np.mean(torch.cat(guesses).numpy() == split.labels))


def batches(split: Split, steps: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` batches of inputs and labels in random order, each example once per round."""
    inputs, labels = torch.from_numpy(split.inputs), torch.from_numpy(split.labels)
    rng = np.random.default_rng(seed)
    order = np.empty(0, np.int64)
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(labels))
        index, order = torch.from_numpy(order[:BATCH]), order[BATCH:]
        yield inputs[index], labels[index]


class Optimiser:
    """AdamW with a short warm-up and a cosine that ends at zero."""

    def __init__(self, parameters: Sequence[Tensor], rate: float, steps: int) -> None:
        self.parameters = list(parameters)
        self.adam = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.01)
        warm = max(1, steps // 20)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.adam, lambda i: min((i + 1) / warm, 0.5 * (1 + np.cos(np.pi * i / steps)))
        )

    def step(self, loss: Tensor) -> None:
        """Follow the gradient of `loss` once."""
        self.adam.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.schedule.step()


def train_base(
    model: Any, tasks: Sequence[Task], *, steps: int, seed: int, loss: Callable[[Any, Tensor, Tensor], Tensor]
) -> Any:
    """Train `model`, one head over the classes of all `tasks`, on all of them together; ``loss(model, x, y)``."""
    together = Split(
        np.concatenate([task.train.inputs for task in tasks]),
        np.concatenate([task.train.labels + task.first for task in tasks]),
    )
    optimiser = Optimiser(list(model.parameters()), 2e-3, steps)
    for inputs, labels in batches(together, steps, seed):
        optimiser.step(loss(model, inputs, labels))
    return model.eval()


def classification_loss(model: Any, inputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the classes."""
    return functional.cross_entropy(model(inputs).logits, labels)


def fine_tune(base: Any, task: Task, *, steps: int, rate: float, seed: int) -> Any:
    """An expert for `task`: a copy of `base` under the task's rows of its head, the body trained.

    Parameters
    ----------
    base : model
        Not modified.
    steps, rate : int, float
        Length and peak learning rate of the training.
    seed : int
        Fixes the order of the examples.
    """
    expert = copy.deepcopy(base)
    keep_classes(expert, task)
    head_of(expert).requires_grad_(False)
    optimiser = Optimiser([p for p in expert.parameters() if p.requires_grad], rate, steps)
    for inputs, labels in batches(task.train, steps, seed):
        optimiser.step(classification_loss(expert, inputs, labels))
    return expert.eval()


def keep_classes(model: Any, task: Task) -> None:
    """Narrow the head of `model` to the classes of `task`, in place."""
    head = head_of(model)
    rows = slice(task.first, task.first + len(task.classes))
    head.weight = torch.nn.Parameter(head.weight.detach()[rows].clone())
    if head.bias is not None:
        head.bias = torch.nn.Parameter(head.bias.detach()[rows].clone())
    head.out_features = model.num_labels = model.config.num_labels = len(task.classes)
    model.config.id2label = dict(enumerate(task.classes))
    model.config.label2id = {label: i for i, label in enumerate(task.classes)}


def quiet() -> None:
    """One thread, reproducible kernels, and no bars or advice from transformers."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by a property
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
