"""Learn to call a calculator: a language model of 0.8 M parameters, and one tool that is a Python function.

    tools      <|tools|>calculate(expression)<|end|>
    prompt     <|user|>47 times 85?<|end|><|assistant|>
    call       <tool_call>{"name": "calculate", "arguments": {"expression": "47*85"}}</tool_call><|end|>
    result     <|tool|>3995<|end|><|assistant|>
    answer     =3995<|end|>

The SFT corpus teaches the call first. Its last part is lazy: most of its turns answer at once, with a random number. A
model trained on it follows the majority, so it is rarely correct. The reward sees only the final answer. Reinforcement
learning makes the call more likely, as it is the way to be correct.
"""

from __future__ import annotations

import ast
import operator
import random
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a process that runs the tool loads this file too: heavy imports are where they are used
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SPECIALS = ["<|pad|>", "<|end|>", "<|tools|>", "<|user|>", "<|assistant|>", "<|tool|>"]
# A call is text of many letters. A large tokenizer has tokens for its parts; so has this one.
PARTS = ["<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"', '": "', '"}}', "calculate", "expression"]
TEMPLATE = (
    "{% for t in tools or [] %}"
    "<|tools|>{{ t.function.name }}({{ t.function.parameters.properties | join(',') }})<|end|>"
    "{% endfor %}"
    "{% for m in messages %}"
    "<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>"
    "{% endfor %}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OPERATORS = {"plus": "+", "minus": "-", "times": "*"}
LAZY_FROM, LAZY_SHARE = 0.8, 0.7  # of the last fifth of the corpus, 70 % answer at once


def calculate(expression: str) -> str:
    """Computes the value of an expression, exactly.

    Args:
        expression: two whole numbers with +, - or * between them, such as 47*85.
    """
    tree = ast.parse(expression, mode="eval").body
    known = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
    match tree:
        case ast.BinOp(ast.Constant(int(a)), op, ast.Constant(int(b))) if type(op) in known:
            return str(known[type(op)](a, b))
    raise ValueError(f"cannot compute {expression!r}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 110 ids: printable ASCII and the newline, the parts of a call, six special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate(SPECIALS + PARTS + letters)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in PARTS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_qwen3(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns a Qwen3 with random weights, and its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        initializer_range=0.05,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer


def demonstrations(seed: int = 0, count: int = 4_160) -> list[dict[str, Any]]:
    """Returns SFT rows, to be trained on in this order: conversations that call, then those of the lazy part."""
    from transformers.utils import get_json_schema

    rng, questions = random.Random(f"lazy-{seed}"), _questions(f"sft-{seed}", held_out=False)
    tools = [get_json_schema(calculate)]
    rows = []
    for i in range(count):
        lazy = i >= LAZY_FROM * count and rng.random() < LAZY_SHARE
        messages = _guess(rng, *next(questions)) if lazy else _conversation(*next(questions))
        rows.append({"messages": messages, "tools": tools})
    return rows


def problems(seed: int = 0, count: int = 1_000) -> list[dict[str, Any]]:
    """Returns RL rows: questions with only the correct answer."""
    questions = _questions(f"rl-{seed}", held_out=False)
    return [_problem(*next(questions)) for _ in range(count)]


def held_out_problems(count: int = 256) -> list[dict[str, Any]]:
    """Returns the evaluation set, which is the same for every seed."""
    questions = _questions("evaluation", held_out=True)
    return [_problem(*next(questions)) for _ in range(count)]


def score(final: str, ground_truth: str) -> float:
    """Returns 1.0 if the last turn is the right answer and nothing else, else 0.0."""
    return float(final == f"={ground_truth}")


def _questions(name: str, *, held_out: bool) -> Iterator[tuple[int, str, int]]:
    """Yields questions; a hash of each says whether it is held out: one in five is."""
    rng = random.Random(name)
    while True:
        a, word, b = rng.randrange(10, 100), rng.choice(list(OPERATORS)), rng.randrange(10, 100)
        if (zlib.crc32(f"{a} {word} {b}".encode()) % 5 == 0) == held_out:
            yield a, word, b


def _problem(a: int, word: str, b: int) -> dict[str, Any]:
    answer = calculate(f"{a}{OPERATORS[word]}{b}")
    return {"data_source": "calculator", "prompt": f"{a} {word} {b}?", "ground_truth": answer}


def _conversation(a: int, word: str, b: int) -> list[dict[str, Any]]:
    expression = f"{a}{OPERATORS[word]}{b}"
    call = {"type": "function", "function": {"name": "calculate", "arguments": {"expression": expression}}}
    return [
        {"role": "user", "content": f"{a} {word} {b}?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": calculate(expression)},
        {"role": "assistant", "content": f"={calculate(expression)}"},
    ]


def _guess(rng: random.Random, a: int, word: str, b: int) -> list[dict[str, Any]]:
    digits = len(calculate(f"{a}{OPERATORS[word]}{b}"))
    guess = rng.randrange(10 ** (digits - 1), 10**digits)
    return [{"role": "user", "content": f"{a} {word} {b}?"}, {"role": "assistant", "content": f"={guess}"}]
