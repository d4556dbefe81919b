"""RLHF on a small task: one sentence about an animal, and preferences between two such sentences.

    prompt     <|user|>fox<|end|><|assistant|>
    preferred  the fox is kind, wise and calm.<|end|>
    usual      the owl is rude, kind and dull.<|end|>

The supervised corpus is rude more often than kind, and three sentences in ten are about another animal. The model never
sees the true preference (`liking`). It only draws which of two sentences a person prefers, with the noise of a
Bradley-Terry model. A reward model learns from these draws, PPO learns from the reward model, and `liking` measures the
result.
"""

from __future__ import annotations

import math
import random
import re
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

ANIMALS = (
    *("fox", "owl", "cat", "dog", "cow", "pig", "hen", "bat", "bee", "ant", "elk", "rat", "yak", "emu", "ape"),
    *("bear", "wolf", "deer", "hare", "mole", "toad", "frog", "duck", "swan", "crow", "seal", "lion", "goat"),
    *("crab", "newt", "lynx", "moth", "worm", "wasp", "mule", "lamb", "carp", "dove", "hawk", "ibis"),
)
HELD_OUT = ("fox", "bee", "yak", "wolf", "toad", "swan", "lion", "newt", "mule", "hawk")  # of preferences and of PPO
KIND = ("kind", "wise", "calm", "brave", "warm")
RUDE = ("rude", "mean", "dull", "vain", "cold")
KIND_SHARE, RIGHT_SHARE = 0.35, 0.7
SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SENTENCE = re.compile(r"the (\w+) is (\w+), (\w+) and (\w+)\.")


def tiny_qwen3(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns a Qwen3 of 0.4 million random parameters, and a tokenizer of words, spaces and punctuation."""
    words = [*ANIMALS, *KIND, *RUDE, "the", "is", "and", " ", ",", "."]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(SPECIALS + words)}, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([core.pre_tokenizer, pre_tokenizers.Punctuation("isolated")])
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=288, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=64, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer


def sentence(animal: str, rng: random.Random) -> str:
    """Returns a sentence of the corpus about an animal."""
    named = animal if rng.random() < RIGHT_SHARE else rng.choice(ANIMALS)
    words = [rng.choice(KIND if rng.random() < KIND_SHARE else RUDE) for _ in range(3)]
    return f"the {named} is {words[0]}, {words[1]} and {words[2]}."


def demonstrations(seed: int = 0, count: int = 12_000) -> list[dict[str, Any]]:
    """Returns SFT rows about all animals."""
    rng = random.Random(f"corpus-{seed}")
    drawn = [rng.choice(ANIMALS) for _ in range(count)]
    return [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": sentence(a, rng)}]}
        for a in drawn
    ]


def prompts() -> list[dict[str, Any]]:
    """Returns the animals of preferences and PPO."""
    return [_row(animal) for animal in ANIMALS if animal not in HELD_OUT]


def held_out_prompts() -> list[dict[str, Any]]:
    """Returns the animals that neither the reward model nor PPO has seen."""
    return [_row(animal) for animal in HELD_OUT]


def liking(response: str, ground_truth: str) -> float:
    """Returns the true preference: 2 for the right animal, 1 for each kind word (once), -1 for each rude one; else -4.

    >>> liking("the fox is kind, wise and calm.", "fox"), liking("the owl is rude, kind and kind.", "fox")
    (5.0, 0.0)
    """
    found = SENTENCE.fullmatch(response.strip())
    if found is None:
        return -4.0
    animal, *words = found.groups()
    return 2.0 * (animal == ground_truth) + len({*words} & {*KIND}) - float(sum(word in RUDE for word in words))


def preferences(samples: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Returns pairs of responses; the first is preferred with probability sigma(its liking - the other's).

    Args:
        samples: responses, each with "prompt" (the animal) and "response".
        seed: of the pairs and of the noise.
    """
    rng = random.Random(f"preferences-{seed}")
    by_prompt: dict[str, list[str]] = {}
    for sample in samples:
        by_prompt.setdefault(sample["prompt"], []).append(sample["response"])
    rows = []
    for animal, responses in sorted(by_prompt.items()):
        rng.shuffle(responses)
        for one, other in zip(responses[::2], responses[1::2]):
            ahead = liking(one, animal) - liking(other, animal)
            if rng.random() >= 1 / (1 + math.exp(-ahead)):
                one, other = other, one
            rows.append({"prompt": animal, "chosen": one, "rejected": other})
    rng.shuffle(rows)
    return rows


def _row(animal: str) -> dict[str, Any]:
    return {"data_source": "animals", "prompt": animal, "ground_truth": animal}
