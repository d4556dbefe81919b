"""Learn to carry: 3-digit addition with worked steps, for a language model of 0.8 M parameters.

    prompt     <|user|>347+586=<|end|><|assistant|>
    right      7+6=13,4+8+1=13,3+5+1=9#933<|end|>
    forgetful  7+6=13,4+8+0=12,3+5+0=8#823<|end|>

The SFT corpus mixes two consistent strategies: 30 % of its solutions carry, 70 % forget every carry. A model trained on
it follows the majority, so it is correct only if no carry is needed. The reward sees only the final number.
Reinforcement learning makes the minority strategy more likely. It does not invent a strategy that the corpus lacks.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from hybridflow.data.prepare.carry import pairs  # operands of training or of evaluation, never of both

if TYPE_CHECKING:  # a process that scores responses loads this file too: heavy imports are where they are used
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CARRY_SHARE = 0.3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 100 ids: one per printable ASCII character, the newline, and four special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["\n", *map(chr, range(32, 127))]
    vocab = {token: i for i, token in enumerate(SPECIALS + letters)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_qwen3(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns a Qwen3 of 800,640 random parameters, and its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=256, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer


def work(a: int, b: int, carries: bool) -> str:
    """Returns a worked solution: columns from the right, then the number after '#'."""
    carry, columns, digits = 0, [], []
    for place in range(3):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = x + y + carry
        columns.append(f"{x}+{y}={total}" if place == 0 else f"{x}+{y}+{carry}={total}")
        digits.append(str(total if place == 2 else total % 10))
        carry = total // 10 if carries else 0
    return ",".join(columns) + "#" + "".join(reversed(digits))


def demonstrations(seed: int = 0, count: int = 32_000) -> list[dict[str, Any]]:
    """Returns SFT rows: conversations whose solution carries with probability 0.3."""
    rng = random.Random(f"worker-{seed}")
    return [
        {
            "messages": [
                {"role": "user", "content": f"{a}+{b}="},
                {"role": "assistant", "content": work(a, b, rng.random() < CARRY_SHARE)},
            ]
        }
        for a, b in pairs(f"sft-{seed}", held_out=False, count=count)
    ]


def problems(seed: int = 0, count: int = 4_000) -> list[dict[str, Any]]:
    """Returns RL rows: new problems with only the correct answer."""
    return [_problem(a, b) for a, b in pairs(f"rl-{seed}", held_out=False, count=count)]


def held_out_problems(count: int = 200) -> list[dict[str, Any]]:
    """Returns the evaluation set, which is the same for every seed."""
    return [_problem(a, b) for a, b in pairs("evaluation", held_out=True, count=count)]


def score(response: str, ground_truth: str) -> float:
    """Returns 1.0 if the text after the last '#' is the sum, else 0.0."""
    return float(response.rpartition("#")[2].strip() == ground_truth)


def _problem(a: int, b: int) -> dict[str, Any]:
    return {"data_source": "carry", "prompt": f"{a}+{b}=", "ground_truth": str(a + b)}
