"""Conversations, a tokenizer of characters, and chat templates as models have them."""

import functools
import json

from data.tokenizer import wrap
from data.vocabularies import PRINTABLE, character_set

SPECIAL = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    # of Llama 2: blanks are cut, EOS ends an answer, BOS begins each question
    "inst": """{% for message in messages %}{% if message.role == 'user' %}
{{ bos_token + '[INST] ' + message.content | trim + ' [/INST]' }}{% else %}
{{ ' ' + message.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}""",
    # of Qwen3: the last answer alone gets an empty thought, which the model writes itself
    "thinking": """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    # asks with a thought begun, which answers do not have (DeepSeek-R1)
    "begun": CHATML.replace("assistant\\n' }}{%- endif", "assistant\\n<think>\\n' }}{%- endif"),
    # ends a turn with no special token
    "lines": """{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}""",
    "marked": """{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{- message.content + '<|im_end|>\\n' }}
{%- endgeneration %}{%- else %}{{- message.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}""",
    "plain": None,
}

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Are you there?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Yes? Who?"},
    {"role": "assistant", "content": "A model, 2 of them."},
]


@functools.cache
def tokenizer(template=CHATML):
    hf = character_set(PRINTABLE)
    hf.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    hf.chat_template = template
    return wrap(hf, "made up")


def talk(*texts):
    """User and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def some(count, length=20):
    """Records of conversations of one or two answers, all different."""
    found = []
    for i in range(count):
        words = ["what is", str(i), "?" * (i % 5)], [str(i * i), "it is" * (i % 3), "."]
        texts = [" ".join(part)[:length] for part in words] * (1 + i % 2)
        found.append({"messages": talk(*texts)})
    return found
