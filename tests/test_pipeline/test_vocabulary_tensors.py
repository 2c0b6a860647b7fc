"""Which tensors have a row per token: from sizes and shapes, and names only where these do not tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergepipe.pipeline.vocabulary_tensors import vocabulary_sizes, vocabulary_tensors
from mergepipe.storage.checkpoint import Checkpoint, TensorEntry


def checkpoint(config: dict[str, Any], **shapes: tuple[int, ...]) -> Checkpoint:
    """Headers alone; underscores of names stand for dots where there are two of them."""
    tensors = {}
    for name, shape in shapes.items():
        dotted = name.replace("__", ".")
        tensors[dotted] = TensorEntry(dotted, "F32", shape, 0, 0, 0)
    return Checkpoint(Path("/none"), (), tensors, config)


def test_tables_heads_and_biases_of_every_size() -> None:
    """Also where models have different numbers of tokens."""
    models = [
        checkpoint(
            {"vocab_size": rows, "hidden_size": 8},
            embed__weight=(rows, 8), head__weight=(rows, 8), head__bias=(rows,), norm__weight=(8,), up__weight=(33, 8),
        )
        for rows in (100, 103)
    ]  # fmt: skip
    assert vocabulary_tensors(models) == {"embed.weight": 0, "head.weight": 0, "head.bias": 0}


def test_inside_numbered_layers_and_beside_a_first_axis_of_one() -> None:
    found = checkpoint(
        {"vocab_size": 100}, model__layers__61__embed_tokens__weight=(100, 8), final_logits_bias=(1, 100)
    )
    assert vocabulary_tensors([found, found]) == {"model.layers.61.embed_tokens.weight": 0, "final_logits_bias": 1}


def test_a_second_vocabulary_of_the_text() -> None:
    """Tables per layer that cover fewer tokens than the main one."""
    config = {"text_config": {"vocab_size": 110, "vocab_size_per_layer_input": 100}, "vision_config": {"vocab_size": 7}}
    found = checkpoint(config, embed_tokens__weight=(110, 8), per_layer__weight=(100, 24), vision__weight=(7, 8))
    assert vocabulary_tensors([found]) == {"embed_tokens.weight": 0, "per_layer.weight": 0}
    assert set(vocabulary_sizes(found)) == {"text_config.vocab_size", "text_config.vocab_size_per_layer_input"}


def test_a_coincidence_of_numbers_is_settled_by_names() -> None:
    """A projection with as many rows as there are tokens is none."""
    found = checkpoint(
        {"vocab_size": 64, "intermediate_size": 64},
        model__embed_tokens__weight=(64, 8), lm_head__weight=(64, 8), lm_head__bias=(64,), up__weight=(64, 8),
    )  # fmt: skip
    assert set(vocabulary_tensors([found])) == {"model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}


@pytest.mark.parametrize("config", [{}, {"vocab_size": 9}])
def test_without_a_size_the_embedding_says_it(config: dict[str, Any]) -> None:
    """No configuration, or one that is wrong."""
    found = checkpoint(config, bert__embeddings__word_embeddings__weight=(50, 8), decoder__bias=(50,), x=(9000, 3))
    assert vocabulary_tensors([found]) == {"bert.embeddings.word_embeddings.weight": 0, "decoder.bias": 0}


def test_a_tensor_must_follow_in_every_model() -> None:
    one = checkpoint({"vocab_size": 50}, embed__weight=(50, 8), other__weight=(50, 8))
    two = checkpoint({"vocab_size": 60}, embed__weight=(60, 8), other__weight=(50, 8))
    assert vocabulary_tensors([one, two]) == {"embed.weight": 0}


def test_models_without_text() -> None:
    assert vocabulary_tensors([checkpoint({"hidden_size": 8}, patch__weight=(8, 3, 4, 4))]) == {}
