"""Learn to walk to a goal: an environment that is a grid of 5 x 5 cells, for a language model of 0.1 M parameters.

    prompt     <|user|>you 1,4 goal 3,0<|end|><|assistant|>
    move       right<|end|>

Each step is a sequence of its own: the model sees where it is, and nothing of the way there. The environment gives 1
for the move that reaches the goal, else 0. The SFT corpus is of single moves: 30 % go towards the goal, the others
anywhere.
"""

from __future__ import annotations

import random
import zlib
from typing import TYPE_CHECKING, Any

from hybridflow.protocols.environments import Action, Observation

if TYPE_CHECKING:  # a process that hosts the environment loads this file too: heavy imports are where they are used
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

SPECIALS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIDE = 5
MOVES = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
SENSIBLE_SHARE = 0.3
Cell = tuple[int, int]


class Grid:
    """A walk to a goal. A move against the border, and a text that is no move, leave the walker where it is."""

    def reset(self, row: dict[str, Any], seed: int) -> Observation:
        """Begins at the cell of the row."""
        self.here, self.goal = tuple(row["start"]), tuple(row["goal"])
        return self._seen()

    def step(self, action: Action) -> Observation:
        """Moves; the walk is over at the goal, which gives 1."""
        self.here = moved(self.here, action.text)
        at_goal = self.here == self.goal
        return self._seen(float(at_goal), at_goal)

    def close(self) -> None:
        """Frees nothing."""

    def _seen(self, reward: float | None = None, done: bool = False) -> Observation:
        text = seen(self.here, self.goal)
        return Observation([{"role": "user", "content": text}], reward, done, anchor=text)


def seen(here: Cell, goal: Cell) -> str:
    """Returns what the model is shown."""
    return f"you {here[0]},{here[1]} goal {goal[0]},{goal[1]}"


def moved(here: Cell, move: str) -> Cell:
    """Returns the cell after a move."""
    dx, dy = MOVES.get(move, (0, 0))
    x, y = here[0] + dx, here[1] + dy
    return (x, y) if 0 <= x < SIDE and 0 <= y < SIDE else here


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer of 103 ids: printable ASCII, one for each move, four special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate([*SPECIALS, *MOVES, *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<|pad|>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in MOVES])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_qwen3(seed: int = 0) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Returns a Qwen3 with random weights, and its tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=512, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        initializer_range=0.08,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config), tokenizer


def demonstrations(seed: int = 0, count: int = 19_200) -> list[dict[str, Any]]:
    """Returns SFT rows: single moves, of which 30 % go towards the goal and the others anywhere."""
    rng, walks = random.Random(f"demonstrations-{seed}"), _walks(held_out=False)
    rows = []
    for _ in range(count):
        (x, y), goal = rng.choice(walks)
        nearer = [m for m in MOVES if _far(moved((x, y), m), goal) < _far((x, y), goal)]
        move = rng.choice(nearer if rng.random() < SENSIBLE_SHARE else list(MOVES))
        shown = {"role": "user", "content": seen((x, y), goal)}
        rows.append({"messages": [shown, {"role": "assistant", "content": move}]})
    return rows


def tasks(seed: int = 0, count: int = 1_000) -> list[dict[str, Any]]:
    """Returns RL rows: where a walk begins, and where it should end."""
    rng, walks = random.Random(f"rl-{seed}"), _walks(held_out=False)
    return [_task(*rng.choice(walks)) for _ in range(count)]


def held_out_tasks() -> list[dict[str, Any]]:
    """Returns the evaluation set: all walks that are held out, the same for every seed."""
    return [_task(*walk) for walk in _walks(held_out=True)]


def _walks(*, held_out: bool) -> list[tuple[Cell, Cell]]:
    """Returns all pairs of two cells; a hash of each says whether it is held out: about one in five is."""
    cells = [(x, y) for x in range(SIDE) for y in range(SIDE)]
    pairs = [(here, goal) for here in cells for goal in cells if here != goal]
    return [pair for pair in pairs if (zlib.crc32(seen(*pair).encode()) % 5 == 0) == held_out]


def _task(start: Cell, goal: Cell) -> dict[str, Any]:
    return {"data_source": "grid", "start": list(start), "goal": list(goal)}


def _far(here: Cell, goal: Cell) -> int:
    return abs(here[0] - goal[0]) + abs(here[1] - goal[1])
