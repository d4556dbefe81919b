"""A model that acts although nobody trained it: most tokens of its vocabulary are whole calls of tools.

Its tools and its environment write a line for each call into the file that the variable DIARY names. Further variables
say what befalls them. KILL="look 7": the seventh call of look kills the whole run; HANG="look 7": it never returns;
DELAYS: the seed of waits of 0 to 50 ms.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from hybridflow.protocols.environments import Action, Observation, tool

SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CALLS = [
    f'<tool_call>{{"name": "{name}", "arguments": {{"number": {i}}}}}</tool_call>'
    for name, count in (("look", 40), ("tick", 20), ("nothing", 4))
    for i in range(count)
]
TEMPLATE = (
    "{% if tools %}<|system|>{% for t in tools %}{{ t.function.name }} {% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def model(seed: int = 0) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model, of 0.1 million parameters, and its tokenizer."""
    os.environ["RUN"] = str(os.getpid())  # for the process that scores
    letters = ["\n", *map(chr, range(32, 127))]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *CALLS, *letters])}, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in CALLS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=0,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Prompts of different lengths."""
    rng = random.Random(0)
    return [{"prompt": "go " + "".join(rng.choices("ab", k=1 + i % 4)), "ground_truth": str(i)} for i in range(count)]


def score(response: str, ground_truth: str) -> float:
    """A reward that differs between responses."""
    _note("score")
    return sum(map(ord, response)) % 101 / 101


def look(number: int) -> str:
    """Looks something up; it has no state.

    Args:
        number: of the thing
    """
    _note(f"look {number}")
    if number % 10 == 3:
        raise ValueError(f"{number} is not there")
    return f"{number} is {number * 37 % 10}"


class Clock:
    """A tool with a state: what it answers depends on the calls before."""

    def __init__(self) -> None:
        self.time = 0

    @tool
    def tick(self, number: int) -> str:
        """Moves a clock on.

        Args:
            number: of hours
        """
        _note(f"tick {number}")
        self.time += number
        return f"it is {self.time % 24}"


class Hall:
    """An environment: three or four rooms one after the other, in which calls are actions."""

    def reset(self, row: dict[str, Any], seed: int) -> Observation:
        """See `Environment.reset`."""
        _note(f"reset {seed}")
        self.room, self.rooms = 0, 3 + seed % 2
        return Observation([{"role": "user", "content": f"hall {seed % 7}"}], anchor=0)

    def step(self, action: Action) -> Observation:
        """See `Environment.step`."""
        _note(f"step {self.room} {action.text[:60]}")
        self.room += 1
        said = f"room {self.room} {len(action.calls)}"
        reward = len(action.calls) / 2
        return Observation([{"role": "user", "content": said}], reward, self.room == self.rooms, self.room)

    def close(self) -> None:
        """See `Environment.close`."""


_counts: Counter[str] = Counter()
_lock = threading.Lock()


def _note(line: str) -> None:
    path, kind = os.environ.get("DIARY"), line.split()[0]
    if path is None:
        return
    with _lock:
        _counts[kind] += 1
        place = f"{kind} {_counts[kind]}"
        with open(path, "a") as file:
            file.write(line + "\n")
    if os.environ.get("KILL") == place:
        os.kill(int(os.environ.get("RUN", os.getpid())), signal.SIGKILL)
    if "DELAYS" in os.environ:
        time.sleep(random.Random(f"{os.environ['DELAYS']} {place}").random() / 20)
    while os.environ.get("HANG") == place:
        time.sleep(3600)


def diary(path: Path) -> list[str]:
    """The lines of a diary."""
    return path.read_text().splitlines() if path.exists() else []
