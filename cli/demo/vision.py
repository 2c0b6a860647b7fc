"""A family of small vision transformers: handwritten digits and three kinds of drawings.

The digits are scikit-learn's (1,797 of them, really written by people); the rest is drawn here: *shapes* in any place
and size, *stripes* in eight directions, *dots* to be counted. Pictures are 12 x 12 and
grey. The base learns all four tasks together from clean pictures; the experts, and all accuracies that the demo shows,
are about pictures with much noise. Stored as float32 in one file each.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ViTConfig, ViTForImageClassification

from mergepipe.cli.demo.training import Array, Family, Task, classification_loss, cut, fine_tune, spoil, train_base

SIDE = 12
HELD_OUT = 400
STEPS, QUICK_STEPS = (2500, 500), (380, 80)
"""Batches for the base and for each expert."""

CLEAN, NOISY = 0.2, 0.7
SHAPES = ("disc", "ring", "square", "triangle", "cross", "diagonal cross")
DIRECTIONS = 8
MOST_DOTS = 5
ROWS, COLUMNS = np.mgrid[0:SIDE, 0:SIDE].astype(np.float32)


def draw_digits(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Scikit-learn's handwritten digits, shuffled, with a margin; at most 1,797."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = rng.permutation(len(digits.target))[:count]
    images = digits.images[order].astype(np.float32) / 16
    margin = (SIDE - 8) // 2
    return np.pad(images, ((0, 0), (margin, margin), (margin, margin))), digits.target[order]


def draw_shapes(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """One shape per picture, of any size, in any place."""
    labels = rng.integers(len(SHAPES), size=count)
    return np.stack([_shape(rng, int(label)) for label in labels]), labels


def _shape(rng: np.random.Generator, label: int) -> Array:
    radius = rng.uniform(2.5, 4.5)
    row, column = rng.uniform(radius, SIDE - 1 - radius, size=2)
    y, x = ROWS - row, COLUMNS - column
    inside = np.maximum(abs(x), abs(y)) <= radius
    distance = np.hypot(x, y)
    drawn = (
        distance <= radius,
        abs(distance - radius + 0.5) <= 0.8,
        inside,
        inside & (abs(x) <= (y + radius) / 2),
        inside & (np.minimum(abs(x), abs(y)) <= 0.8),
        inside & (np.minimum(abs(x - y), abs(x + y)) <= 1.1),
    )[label]
    return np.asarray(drawn, np.float32)


def draw_stripes(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """Stripes of any width and phase, in one of eight directions."""
    labels = rng.integers(DIRECTIONS, size=count)
    angle = (labels * np.pi / DIRECTIONS)[:, None, None]
    frequency, phase = rng.uniform(0.9, 2.2, (count, 1, 1)), rng.uniform(0, 2 * np.pi, (count, 1, 1))
    wave = np.sin(frequency * (np.cos(angle) * COLUMNS + np.sin(angle) * ROWS) + phase)
    return (0.5 + 0.5 * wave).astype(np.float32), labels


def draw_dots(rng: np.random.Generator, count: int) -> tuple[Array, Array]:
    """One to five dots that do not touch."""
    labels = rng.integers(MOST_DOTS, size=count)
    cells = np.array([(r, c) for r in range(1, SIDE - 2, 4) for c in range(1, SIDE - 2, 4)])
    images = np.zeros((count, SIDE, SIDE), np.float32)
    for image, label in zip(images, labels, strict=True):
        for r, c in cells[rng.choice(len(cells), label + 1, replace=False)] + rng.integers(0, 2, (label + 1, 2)):
            image[r : r + 2, c : c + 2] = rng.uniform(0.6, 1)
    return images, labels


KINDS: dict[str, tuple[Callable[[np.random.Generator, int], tuple[Array, Array]], tuple[str, ...]]] = {
    "digits": (draw_digits, tuple("0123456789")),
    "shapes": (draw_shapes, SHAPES),
    "stripes": (draw_stripes, tuple(f"{180 * i / DIRECTIONS:g} degrees" for i in range(DIRECTIONS))),
    "dots": (draw_dots, tuple(str(i + 1) for i in range(MOST_DOTS))),
}


def make_tasks(seed: int, examples: int) -> list[Task]:
    """The four tasks, clean, with up to `examples` pictures to train on (digits: as many as there are)."""
    tasks: list[Task] = []
    first = 0
    for number, (name, (draw, classes)) in enumerate(KINDS.items()):
        images, labels = draw(np.random.default_rng([seed, number]), examples + 2 * HELD_OUT)
        inputs = add_noise(2 * images[:, None] - 1, np.random.default_rng(seed), CLEAN)
        tasks.append(cut(name, classes, first, inputs, labels, HELD_OUT))
        first += len(classes)
    return tasks


def add_noise(images: Array, rng: np.random.Generator, noise: float = NOISY) -> Array:
    """The same pictures through a worse camera."""
    return np.asarray(images + np.float32(noise) * rng.standard_normal(images.shape, np.float32))


def make_model(seed: int, n_classes: int) -> Any:
    """An untrained ViT."""
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=4,
        num_channels=1,
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=n_classes,
    )
    return ViTForImageClassification(config)


def make_family(folder: Path, *, seed: int, quick: bool) -> Family:
    """Train the base and one expert per task, and write them below `folder`."""
    base_steps, expert_steps = QUICK_STEPS if quick else STEPS
    clean = make_tasks(seed, 2000 if quick else 4000)
    model = make_model(seed, sum(len(task.classes) for task in clean))
    base = train_base(model, clean, steps=base_steps, seed=seed, loss=classification_loss)
    base.save_pretrained(folder / "base")
    tasks = tuple(spoil(task, add_noise, seed) for task in clean)
    experts = {}
    for number, task in enumerate(tasks):
        expert = fine_tune(base, task, steps=expert_steps, rate=3e-4, seed=seed + number)
        experts[task.name] = folder / task.name
        expert.save_pretrained(experts[task.name])
    title = "vision transformers (ViT, float32, one file each)"
    return Family("vision", title, ViTForImageClassification, folder / "base", experts, tasks)
