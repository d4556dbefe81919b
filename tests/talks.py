"""Tokenizers with chat templates of several makes, and conversations with tools, for tests of both."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

REAL = Path(__file__).resolve().parents[1] / ".tokenizers"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "[INST]", "[/INST]", "</s>"]

_TOOLS = "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n' if (m.content and m.content[-1] != '\n') or not loop.first }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)
_OPENING = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Writes every turn as it is: nothing is ever rewritten.
PLAIN = (
    _TOOLS + "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + _CALLS + "<|im_end|>\n{% endfor %}"
) + _OPENING
# Strips texts, as those of Llama 3 and Gemma do.
TRIMS = PLAIN.replace("{{ m.content }}", "{{ m.content | trim }}")
# Wants arguments as JSON text, and ids of nine letters and digits, as Mistral's do; ends turns without a line break.
STRICT = (
    "{% if tools %}[INST]{{ tools | tojson }}[/INST]{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}{% if m.tool_call_id | length != 9 %}{{ raise_exception('ids have 9 characters') }}"
    "{% endif %}[INST]{{ m.tool_call_id }}:{{ m.content }}[/INST]"
    "{% else %}{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments + \'\' }}}\n</tool_call>'
    "{% endfor %}</s>{% endif %}{% endfor %}"
)
# Ends the last turn in another way than earlier ones, as gpt-oss' does.
TWO_ENDS = PLAIN.replace(
    "<|im_end|>\n{% endfor %}{% if add",
    "{{ '<|end|>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}\n{% endfor %}{% if add",
)
# Shows neither tools nor calls.
WITHOUT_TOOLS = PLAIN.replace(_TOOLS, "").replace(_CALLS, "")

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Computes.",
        "parameters": {
            "type": "object",
            "properties": {"text": {"type": "string", "description": "What to compute."}},
            "required": ["text"],
        },
    },
}
THOUGHT = "<think>\nhm, well\n</think>\n\n"


def byte_tokenizer(template: str, end: str = "<|im_end|>") -> PreTrainedTokenizerBase:
    """A tokenizer of single bytes and a few special tokens, with a template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end)
    tokenizer.chat_template = template
    return tokenizer


@functools.cache
def real_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer that people have; the test is skipped where `make tokenizers` could not fetch it."""
    if not (REAL / name / "tokenizer.json").exists():
        pytest.skip(f"{name} is not in {REAL}: make tokenizers")
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(REAL / name)
    return found


def user(text: str) -> dict[str, Any]:
    """A message of the user."""
    return {"role": "user", "content": text}


def turn(text: str, *calls: str, number: int = 0) -> dict[str, Any]:
    """A turn of the assistant, with calls of the calculator."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        functions = ({"name": "calculator", "arguments": {"text": call}} for call in calls)
        message["tool_calls"] = [
            {"id": f"abc{number:03d}{i:03d}", "type": "function", "function": f} for i, f in enumerate(functions)
        ]
    return message


def answer(text: str, number: int = 0, call: int = 0) -> dict[str, Any]:
    """A result of the calculator."""
    return {"role": "tool", "tool_call_id": f"abc{number:03d}{call:03d}", "name": "calculator", "content": text}


def hermes(*calls: str) -> str:
    """Calls of the calculator as Qwen writes them."""
    bodies = (json.dumps({"name": "calculator", "arguments": {"text": call}}, ensure_ascii=False) for call in calls)
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


def deepseek(*calls: str) -> str:
    """Calls of the calculator as the template of DeepSeek V3 writes them: it closes two, and leaves one open."""
    one = "<|tool_call_begin|>function<|tool_sep|>calculator\n```json\n{}\n```<|tool_call_end|>"
    bodies = [one.replace("{}", json.dumps({"text": call}, ensure_ascii=False)) for call in calls]
    text = "<|tool_calls_begin|>" + "\n".join(bodies) + ("<|tool_calls_end|>" if len(calls) > 1 else "")
    return text.replace("|", "\uff5c").replace("_", "\u2581")
