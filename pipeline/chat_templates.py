"""Chat templates: the ones that a recipe can name, which one models have in common, and what is wrong with a text.

Each built-in template follows the published description of its format: the messages, what stands around each, and what
asks for the next answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

BUILTIN = {
    # Stanford Alpaca: headed sections, an optional preamble.
    "alpaca": (
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'system' -%}{{ message['content'] + '\\n\\n' }}\n"
        "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}\n"
        "{%- elif message['role'] == 'assistant' -%}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}"
    ),
    # OpenAI's chat markup language: every message between two marks, its role on the first line.
    "chatml": (
        "{%- for message in messages -%}\n"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
    # LG EXAONE 3: roles in brackets; a system turn always comes first; user turns end with the line.
    "exaone": (
        "{%- if messages and messages[0]['role'] != 'system' -%}{{ '[|system|][|endofturn|]\\n' }}{%- endif -%}\n"
        "{%- for message in messages -%}\n"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}\n"
        "{%- if message['role'] != 'user' -%}{{ '[|endofturn|]' }}{%- endif -%}\n"
        "{%- if not loop.last or add_generation_prompt -%}{{ '\\n' }}{%- endif -%}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}{{ '[|assistant|]' }}{%- endif -%}"
    ),
    # Meta Llama 3: a header with the role, an empty line, the trimmed text, an end-of-turn mark.
    "llama3": (
        "{{- bos_token -}}\n"
        "{%- for message in messages -%}\n"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}\n"
        "{{- message['content'] | trim + '<|eot_id|>' }}\n"
        "{%- endfor -%}\n"
        "{%- if add_generation_prompt -%}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}"
        "{%- endif -%}"
    ),
    # Mistral instruct: user turns between marks, a system text at the head of the first of them.
    "mistral": (
        "{{- bos_token -}}\n"
        "{%- set state = namespace(system='') -%}\n"
        "{%- for message in messages -%}\n"
        "{%- if message['role'] == 'system' -%}{%- set state.system = message['content'] + '\\n\\n' -%}\n"
        "{%- elif message['role'] == 'user' -%}"
        "{{ '[INST] ' + state.system + message['content'] + ' [/INST]' }}{%- set state.system = '' -%}\n"
        "{%- else -%}{{ ' ' + message['content'] + eos_token }}\n"
        "{%- endif -%}\n"
        "{%- endfor -%}"
    ),
}
"""Text of each template by its name in recipes."""

TEMPLATE_FILE = "chat_template.jinja"


def fault_of(text: str) -> str | None:
    """What is wrong with the text of a template, in words; None if it can be read. Nothing of it is carried out."""
    try:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        return "a template of your own is checked with jinja2: install mergepipe[tokenizers]"
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    # transformers' own mark around what an assistant says; to Jinja alone it is an unknown tag.
    plain = text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    try:
        environment.parse(plain.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", ""))
    except (TemplateSyntaxError, RecursionError) as error:
        return f"is no valid Jinja template: {error}"
    return None


def template_of(folder: Path) -> str | None:
    """The chat template of a model, wherever it keeps it; None if it has none that can be read."""
    try:
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    except (OSError, ValueError):
        pass
    for name in ("tokenizer_config.json", "chat_template.json"):
        try:
            found = json.loads((folder / name).read_bytes()).get("chat_template")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        if isinstance(found, list):
            named = [entry for entry in found if isinstance(entry, dict)]
            found = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        if isinstance(found, str) and found:
            return found
    return None


def most_common(templates: Sequence[str | None]) -> str | None:
    """The template that most models have; among equals the first one's, which is the base's if it is one of them.

    Examples
    --------
    >>> most_common(["a", None, "b", "b"]), most_common(["a", "b"]), most_common([None])
    ('b', 'a', None)
    """
    counted = Counter(template for template in templates if template is not None)
    return max(counted, key=lambda template: counted[template]) if counted else None
