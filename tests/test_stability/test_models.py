"""What a model writes and how two diverge, against plain loops over whole forward passes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from mergepipe.errors import CheckpointError, CheckpointNotFoundError, UsageError
from mergepipe.pipeline import generation
from mergepipe.pipeline.generation import Decoding, LanguageModel
from mergepipe.pipeline.row_divergence import mean_row_divergence, row_divergences
from mergepipe.pipeline.stability_report import Settings, SharedTokens, TextDivergence, measure_stability
from mergepipe.storage.checkpoint import open_checkpoint
from support.language import make_tokenizer, write_model

# transformers imports modules that warn about themselves
pytestmark = [pytest.mark.filterwarnings("default"), pytest.mark.usefixtures("one_thread")]

PROMPTS = ("abc", "de", "gh abc", "cab")
SETTINGS = Settings(tokens=8, n=2, seed=5, samples=2, loop_span=4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and another one that was made from it."""
    folder = tmp_path_factory.mktemp("pair")
    first = write_model(folder / "first", make_tokenizer(), seed=1)
    return first, write_model(folder / "second", make_tokenizer(), seed=2, start=first, changed=0.1)


def plain(folder: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def next_logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0].double()
    return found


def test_greedy_writing_is_the_best_token_again_and_again(pair: tuple[Path, Path]) -> None:
    model, reference = LanguageModel(pair[0]), plain(pair[0])
    encoded = [model.encode(prompt) for prompt in PROMPTS]
    found = model.write(encoded, Decoding(tokens=8))
    assert [continuation.prompt for continuation in found] == encoded
    for continuation in found:
        tokens = continuation.prompt
        for token, entropy in zip(continuation.tokens, continuation.entropies, strict=True):
            logs = next_logits(reference, tokens)[-1].log_softmax(-1)
            assert token == int(logs.argmax())
            assert entropy == pytest.approx(float(-(logs.exp() * logs).sum()), rel=1e-5)
            tokens = (*tokens, token)
        ended = int(next_logits(reference, tokens)[-1].argmax()) == 1
        assert ended or len(continuation.tokens) == 8
        assert 1 not in continuation.tokens


def test_what_is_drawn_depends_on_the_seed_and_on_nothing_else(pair: tuple[Path, Path]) -> None:
    model = LanguageModel(pair[0])
    encoded = [model.encode(prompt) for prompt in PROMPTS]
    drawn = Decoding(tokens=8, temperature=1.0, samples=3, seed=1)
    found = model.write(encoded, drawn)
    assert found == model.write(encoded, drawn)
    assert [c.tokens for c in found[:6]] == [c.tokens for c in model.write(encoded[:2], drawn)], "not on other prompts"
    assert found != model.write(encoded, Decoding(tokens=8, temperature=1.0, samples=3, seed=2))
    assert len({c.tokens for c in found[:3]}) > 1, "samples of a prompt differ"
    cold = model.write(encoded, Decoding(tokens=8, temperature=1e-4, seed=1))
    assert cold == model.write(encoded, Decoding(tokens=8)), "a temperature near 0 is greedy"


def test_drawn_tokens_have_their_frequencies(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "BATCH", 500)
    model = LanguageModel(pair[0])
    prompt = model.encode("abc")
    found = model.write([prompt], Decoding(tokens=1, temperature=2.0, samples=3000))
    counts = np.bincount([c.tokens[0] if c.tokens else 1 for c in found], minlength=model.width)
    expected = (next_logits(plain(pair[0]), prompt)[-1] / 2).softmax(-1).numpy()
    np.testing.assert_allclose(counts / 3000, expected, atol=5 * math.sqrt(0.25 / 3000))


def by_hand(front: Any, other: Any, texts: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> float:
    """Mean of KL(front || other) before every token that follows."""
    found: list[float] = []
    for before, after in texts:
        p, q = (next_logits(model, (*before, *after)).log_softmax(-1) for model in (front, other))
        for place in range(len(before) - 1, len(before) + len(after) - 1):
            found.append(float((p[place].exp() * (p[place] - q[place])).sum()))
    return sum(found) / len(found)


def test_divergences_are_means_of_sums_over_the_vocabulary(pair: tuple[Path, Path]) -> None:
    report = measure_stability(pair[0], [pair[1]], PROMPTS, SETTINGS)
    (compared,) = report.pairs
    assert compared.shared_tokens is None
    assert [text.text for text in compared.texts] == ["prompts", "greedy", "sampling"]
    models = [plain(folder) for folder in pair]
    writers = [LanguageModel(folder) for folder in pair]
    encoded = [writers[0].encode(prompt) for prompt in PROMPTS]
    prompts = [(ids[:1], ids[1:]) for ids in encoded]
    expected = {"prompts": [by_hand(*models, prompts), by_hand(*models[::-1], prompts)]}
    for name, decoding in SETTINGS.decodings.items():
        texts = [[(c.prompt, c.tokens) for c in writer.write(encoded, decoding)] for writer in writers]
        expected[name] = [by_hand(*models, texts[0]), by_hand(*models[::-1], texts[1])]
        assert [len(model.writings[name].distinct) for model in report.models] == [2, 2]
        assert report.models[1].writings[name].tokens == sum(len(after) for _, after in texts[1])
    for text in compared.texts:
        assert [text.merged_to_parent, text.parent_to_merged] == pytest.approx(expected[text.text], rel=1e-4)
        assert text.left_out == 0
    assert compared.texts[0].positions == (sum(map(len, PROMPTS)) - len(PROMPTS),) * 2


def test_a_model_does_not_diverge_from_itself(pair: tuple[Path, Path]) -> None:
    (compared,) = measure_stability(pair[0], [pair[0]], PROMPTS, SETTINGS).pairs
    assert {value for text in compared.texts for value in (text.merged_to_parent, text.parent_to_merged)} == {0.0}
    assert (compared.weights.forward, compared.weights.backward) == (0, 0)


def test_prompts_of_one_token_have_no_place_to_compare(pair: tuple[Path, Path]) -> None:
    (compared,) = measure_stability(pair[0], [pair[1]], ["a"], SETTINGS).pairs
    assert compared.texts[0] == TextDivergence("prompts", None, None, (0, 0), 0.0)


def widened(folder: Path, source: Path, order: list[int]) -> Path:
    """The model in `source` with its tokens in another order; -1 stands for a new one."""
    model = plain(source)
    torch.manual_seed(9)
    old_in, old_out = model.get_input_embeddings().weight.detach(), model.get_output_embeddings().weight.detach()
    new = [torch.stack([old[i] if i >= 0 else torch.randn(old.shape[1]) for i in order]) for old in (old_in, old_out)]
    model.resize_token_embeddings(len(order), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(new[0])
        model.get_output_embeddings().weight.copy_(new[1])
    model.save_pretrained(folder)
    return folder


def test_another_vocabulary_is_compared_over_the_shared_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The same model, once with its letters in another order and an added token: no divergence but for rounding."""
    tokenizer = make_tokenizer(["<|new|>"], letters=" hgfedcba")
    ids, theirs = make_tokenizer().get_vocab(), tokenizer.get_vocab()
    order = [ids.get(name, -1) for name, _ in sorted(theirs.items(), key=lambda item: item[1])]
    other = widened(tmp_path / "other", pair[0], order)
    tokenizer.save_pretrained(other)
    (compared,) = measure_stability(pair[0], [other], PROMPTS, SETTINGS).pairs
    assert compared.refused is None
    assert compared.shared_tokens == len(ids)
    prompts = compared.texts[0]
    assert prompts.merged_to_parent == pytest.approx(0, abs=1e-9)
    assert prompts.left_out > 0.001, "the added token takes some probability"
    shared = SharedTokens(LanguageModel(other), LanguageModel(pair[0]))
    assert shared.translate([theirs["a"], theirs["h"], theirs["<|new|>"], theirs["a"]]) == [ids["a"], ids["h"]]
    written = LanguageModel(pair[0]).write([(ids["a"],)], Decoding(12))[0]
    again = LanguageModel(other).write([(theirs["a"],)], Decoding(12))[0]
    cut = shared.translate(again.tokens)
    assert tuple(cut) == written.tokens[: len(cut)]


def test_other_tokens_of_the_same_prompt_are_a_reason(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", make_tokenizer(pieces=["ab"]))
    (compared,) = measure_stability(pair[0], [other], ["cd", "abc"], SETTINGS).pairs
    assert compared.texts == ()
    assert compared.refused is not None
    assert "prompt 2 is 3 tokens" in compared.refused


def test_models_that_can_not_be_judged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    good = pair[0]
    with pytest.raises(CheckpointNotFoundError):
        measure_stability(good, [tmp_path / "none"], PROMPTS, SETTINGS)
    bare = write_model(tmp_path / "bare", None)
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        LanguageModel(bare)
    classifier = LlamaForSequenceClassification.from_pretrained(good, num_labels=3)
    classifier.save_pretrained(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors, 'lm_head\.weight'"):
        LanguageModel(tmp_path / "classifier")
    with pytest.raises(CheckpointError, match="do not belong together"):
        LanguageModel(write_model(tmp_path / "narrow", make_tokenizer(), width=7))
    overflown = plain(good)
    with torch.no_grad():
        overflown.lm_head.weight[3] = float("inf")
    overflown.save_pretrained(tmp_path / "overflown")
    make_tokenizer().save_pretrained(tmp_path / "overflown")
    with pytest.raises(CheckpointError, match="overflow"):
        measure_stability(tmp_path / "overflown", [good], PROMPTS, SETTINGS)


def test_code_in_a_folder_is_not_run(pair: tuple[Path, Path], tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", make_tokenizer())
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = (
        (folder / "config.json").read_text(encoding="utf-8").replace('"model_type": "llama"', '"model_type": "evil"')
    )
    config = config.replace("{", '{"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},', 1)
    (folder / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match="transformers does not load"):
        LanguageModel(folder)
    assert not (tmp_path / "ran").exists()


def test_prompts_that_do_not_fit(pair: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="prompt 2 is 60 tokens long; with 8 more it exceeds the 64 positions"):
        measure_stability(pair[0], [pair[1]], ["a", "a" * 60], SETTINGS)


def test_row_divergence_of_weights_by_hand(pair: tuple[Path, Path]) -> None:
    checkpoints = [open_checkpoint(folder) for folder in pair]
    states = [{name: value.double() for name, value in plain(folder).state_dict().items()} for folder in pair]
    sums, rows = np.zeros(2), 0
    found = {tensor.name: tensor for tensor in row_divergences(*checkpoints)}
    assert set(found) == set(states[0])
    for name, tensor in found.items():
        p, q = (state[name].reshape(-1, state[name].shape[-1]).log_softmax(-1) for state in states)
        both = np.array([float((p.exp() * (p - q)).sum()), float((q.exp() * (q - p)).sum())])
        assert [tensor.forward, tensor.backward] == pytest.approx(both / len(p), rel=1e-6)
        assert tensor.rows == len(p)
        sums, rows = sums + both, rows + len(p)
    whole = mean_row_divergence(*checkpoints)
    assert [whole.forward, whole.backward, whole.rows] == pytest.approx([*(sums / rows), rows], rel=1e-6)
