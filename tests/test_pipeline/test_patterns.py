"""Regular expressions from outside: those that people write pass, those that may take for ever do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergepipe.pipeline.patterns import compile_pattern


@pytest.mark.parametrize(
    "text",
    [
        "embed_tokens|lm_head",
        r"^model\.layers\.(1?[0-9]|2[0-3])\.",
        r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.(weight|bias)$",
        r"(?:q|k|v)_proj",
        r"[(*+|)]{2}",
        r"\(a+\)+",
        r"(?=.*attn)(?!.*bias)",
        r"(layers)+",
        "a{2,3}b{4}",
        "{}",
        r"[]+*)(]",
    ],
)
def test_what_people_write_is_compiled(text: str) -> None:
    assert compile_pattern(text).pattern == text


@pytest.mark.parametrize(
    "text",
    [
        "^(([a-z.0-9_])+)+!$",
        "(a+)+$",
        "((a+))*$",
        "(a|a)*$",
        "(?:a|ab)+$",
        "(a{1,9}){1,9}$",
        "(x(a+)?y)*",
        "[)](b*)+",
        ".*.*.*.*.*.*.*!",
        "a" * 1001,
    ],
)
def test_what_may_take_for_ever_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"for ever|characters"):
        compile_pattern(text)


@given(st.text("ab(|)*+?[]{},1\\.^", max_size=12))
def test_any_text_is_compiled_or_refused_with_the_reason(text: str) -> None:
    try:
        compiled = compile_pattern(text)
    except ValueError as error:
        said = str(error)
    else:
        said = repr(compiled.pattern)
    assert said.startswith(repr(text))
