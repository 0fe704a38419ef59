"""Render chat templates with transformers, as goldens for ours: templates.json.

Run in an environment of its own with transformers 5.24.0 and the demo's files:

    python tests/golden/make_templates.py qwen3_mlx/demo

Each template uses something that published ones do. `special` replaces special tokens in
tokenizer_config.json.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
SPECIAL = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello", "reasoning_content": "Greet."},
    {"role": "user", "content": "Bye é <b>"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "é <b> & 'c'",
            "parameters": {"type": "object", "properties": {"b": {"enum": [1.5]}, "a": {}}},
        },
    }
]
TEMPLATES: dict[str, str] = {
    "special tokens around turns": (
        "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}" + HEADER
    ),
    "special tokens that are not there": (
        "{{ unk_token is defined }} {{ sep_token }}{{ pad_token }}{{ mask_token is defined }}"
    ),
    "generation blocks": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}\n{% endfor %}" + HEADER
    ),
    "generation blocks on lines of their own": (
        "{% for m in messages %}\n    {%- if m.role == 'assistant' %}\n    {%- generation %}\n"
        "        {{- m.content }}\n        {% set said = m.content %}\n    {%- endgeneration %}\n"
        "    {%- endif %}\n[{{ said }}]\n{% endfor %}"
    ),
    "tojson's arguments": (
        "{% for t in tools or [] %}{{ t | tojson(ensure_ascii=True) }}\n"
        "{{ t | tojson(separators=(',', ':')) }}\n{{ t | tojson(indent=2, sort_keys=true) }}\n"
        "{{ t | tojson(true, 1) }}\n{{ t | tojson }}\n{% endfor %}"
    ),
    "documents": "{{ documents is defined }}{{ documents is none }}{% if documents %}D{% endif %}",
    "names that nobody defines": (
        "[{{ nothing }}][{{ messages[0].nothing }}][{{ nothing is defined }}]"
        "[{{ messages[0]['nothing'] or 'none' }}]" + TURNS
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}"
        "{{ m.content }}{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
    "macros, namespaces and slices": (
        "{%- macro turn(m) -%}{{ '[' ~ m.role | upper ~ '] ' ~ m.content | trim }}{%- endmacro -%}"
        "{%- set ns = namespace(count=0) -%}{%- for m in messages[::-1] -%}"
        "{%- set ns.count = ns.count + 1 -%}{{ turn(m) }}{{ ns.count }}\n{%- endfor -%}"
    ),
    "thinking by other names": (
        "{% for m in messages %}{{ m.thinking or '-' }}|{{ m.reasoning_content or '-' }}|"
        "{{ m.reasoning or '-' }}\n{% endfor %}"
    ),
    "blocks that trim": (
        "{% for m in messages %}\n    {% if m.role == 'user' %}\n  U: {{ m.content }}\n"
        "    {% endif %}\n{% endfor %}\n  end\n"
    ),
    "mappings and filters": (
        "{% for t in tools or [] %}{% for key, value in t.function.parameters.properties | items %}"
        "{{ key }}={{ value | length }};{% endfor %}{{ t.function.description | safe }}"
        "{{ t.function.parameters is mapping }}{{ t.function | dictsort | first }}{% endfor %}"
        "{{ dict(a=1).a }}{{ messages | map(attribute='role') | join(',') }}"
    ),
    "the switch of thinking": (
        TURNS + HEADER + "{% if enable_thinking is defined and enable_thinking is false %}"
        "<think>\n\n</think>\n\n{% endif %}"
    ),
    "methods of strings": (
        "{{ messages[2].content.split(' ')[-1] }}{{ messages[0].content.startswith('H') }}"
        "{{ messages[1].content.strip('Ho') }}{{ 'x' in messages[0].content }}"
        "{{ messages[0].content * 2 }}{{ messages[0].content[1:] }}"
    ),
}


def render(folder: Path, name: str, template: str) -> dict[str, Any]:
    """Render a template with a copy of the demo's tokenizer."""
    (folder / "chat_template.jinja").write_text(template)
    config = json.loads((folder / "tokenizer_config.json").read_text()) | SPECIAL
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tools = TOOLS if "tools" in template else None
    text = tokenizer.apply_chat_template(
        TALK, tools=tools, add_generation_prompt=True, tokenize=False
    )
    return {"name": name, "template": template, "tools": tools, "text": text}


def main() -> None:
    """Write the goldens."""
    rendered = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(sys.argv[1]) / file, folder / file)
        for title, template in TEMPLATES.items():
            rendered.append(render(folder, title, template))
    content = {"special": SPECIAL, "messages": TALK, "cases": rendered}
    beside = Path(__file__).with_name("templates.json")
    beside.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
