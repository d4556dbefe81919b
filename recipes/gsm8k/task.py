"""A language model of 1.1 million random parameters for GSM8K, to run every stage on a CPU.

Its tokenizer is a byte-level BPE of 2,048 tokens, made from the training questions that
`hybridflow prepare gsm8k --out data/gsm8k` has written.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hybridflow.data.files import read_file
from hybridflow.errors import UserError

QUESTIONS = Path("data/gsm8k/train.parquet")  # from the folder in which the command is run
VOCABULARY = 2048
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@functools.cache
def learn_bpe(file: Path) -> str:
    """Returns a tokenizer trained on these questions, as JSON; digits stay single, as in Qwen's."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+|\s+| ?[^\s\p{L}\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator((row["extra_info"]["question"] for row in read_file(file)), trainer)
    return str(core.to_str())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer with a chat template like Qwen's."""
    if not QUESTIONS.is_file():
        raise UserError(
            f"no {QUESTIONS} to make a tokenizer from",
            fix=f"run: hybridflow prepare gsm8k --from FOLDER_OR_HUB --out {QUESTIONS.parent}",
        )
    core = Tokenizer.from_str(learn_bpe(QUESTIONS.resolve()))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_qwen3(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns a Qwen3 with random weights, and its tokenizer."""
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer
