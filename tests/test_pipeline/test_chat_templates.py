"""Chat templates: built in, common to models, or given; and where transformers finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mergepipe
from mergepipe.errors import RecipeError
from mergepipe.pipeline.chat_templates import BUILTIN, fault_of, most_common, template_of
from mergepipe.pipeline.recipe import parse_recipe
from support.vocabularies import byte_tokenizer, write_model

pytestmark = pytest.mark.filterwarnings("default")

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
]

RENDERED = {
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi!\n\n### Response:\nHello.</s>\n\n### Instruction:\nBye.\n\n### Response:\n"
    ),
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi!\n[|assistant|]Hello.[|endofturn|]\n[|user|]Bye.\n[|assistant|]"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi! [/INST] Hello.</s>[INST] Bye. [/INST]",
}


@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_built_in_templates_write_their_formats(name: str) -> None:
    tokenizer = byte_tokenizer([])
    tokenizer.chat_template = BUILTIN[name]
    assert tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True) == RENDERED[name]
    assert fault_of(BUILTIN[name]) is None


def write_models(folder: Path, templates: list[str | None]) -> list[str]:
    """One model for each template, all of one vocabulary."""
    tokenizer = byte_tokenizer(["ab"])
    found = [write_model(folder / f"m{n}", tokenizer, n, template=text) for n, text in enumerate(templates)]
    return [str(model.folder) for model in found]


def merged(folder: Path, models: list[str], template: str, **more: Any) -> Path:
    listed = [{"model": path, "parameters": {"weight": 1}} for path in models]
    document = {"merge_method": "linear", "models": listed, "chat_template": template, **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(document))
    plan = mergepipe.build(folder / "recipe.yaml", work=folder / "work", out=folder / "merged")
    (folder / "notes").write_text("\n".join(plan.notes))
    return mergepipe.run(folder / "work").output


def loaded(folder: Path) -> str | None:
    import transformers

    found: str | None = transformers.AutoTokenizer.from_pretrained(folder).chat_template
    return found


def test_auto_is_what_most_models_have(tmp_path: Path) -> None:
    out = merged(tmp_path, write_models(tmp_path, ["A", "B", None, "B"]), "auto")
    assert loaded(out) == "B"
    assert "which 2 of 4 have" in (tmp_path / "notes").read_text(encoding="utf-8")


def test_auto_among_equals_is_the_bases(tmp_path: Path) -> None:
    models = write_models(tmp_path, ["A", "B"])
    assert loaded(merged(tmp_path, models, "auto", base_model=models[1])) == "B"


def test_auto_without_any(tmp_path: Path) -> None:
    assert loaded(merged(tmp_path, write_models(tmp_path, [None, None]), "auto")) is None
    assert "no model has a chat template" in (tmp_path / "notes").read_text(encoding="utf-8")


@pytest.mark.parametrize("source", [None, "union"])
def test_a_template_given_in_the_recipe(tmp_path: Path, source: str | None) -> None:
    models = write_models(tmp_path, ["A", "B"])
    text = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    assert loaded(merged(tmp_path, models, text, **({"tokenizer_source": source} if source else {}))) == text


def test_it_replaces_the_one_inside_older_configurations(tmp_path: Path) -> None:
    """Every file that a reader may look into says the same; what else it says stays."""
    models = write_models(tmp_path, ["A", None])
    folder = Path(models[0])
    (folder / "chat_template.jinja").unlink()
    for name in ("tokenizer_config.json", "chat_template.json"):
        values = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps({**values, "chat_template": "old", "kept": 1}))
    out = merged(tmp_path, models, "chatml")
    for name in ("tokenizer_config.json", "chat_template.json"):
        values = json.loads((out / name).read_text(encoding="utf-8"))
        assert (values["chat_template"], values["kept"]) == (BUILTIN["chatml"], 1)
    assert loaded(out) == BUILTIN["chatml"]


def test_where_a_model_keeps_its_template(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]})
    )
    assert template_of(tmp_path) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    assert template_of(tmp_path) == "J"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("[" * 100_000)
    assert template_of(tmp_path) is None


def test_most_common_does_not_depend_on_the_order_of_equals() -> None:
    assert most_common(["b", "a", None, "a", "b"]) == "b"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("chatlm", "did you mean 'chatml'"),
        ("nonsense", "there is auto, alpaca, chatml, exaone, llama3, mistral"),
        ("{{ x ", "no valid Jinja template"),
        ("{% for x in y %}", "no valid Jinja template"),
        (3, "found 3"),
        ("", "found ''"),
    ],
)
def test_templates_that_can_not_be(template: object, message: str) -> None:
    document = {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": 1}}]}
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe(document | {"chat_template": template})
    assert [fault.path for fault in caught.value.faults] == ["$.chat_template"]


def test_transformers_own_tags_are_no_fault() -> None:
    assert fault_of("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}") is None


def test_a_template_is_not_carried_out() -> None:
    assert fault_of("{{ ''.__class__.__mro__[1].__subclasses__() }}") is None
