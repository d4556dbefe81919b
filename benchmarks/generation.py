"""The cost of generation on one thread, here and with `generate` of transformers, at the same response lengths.

    python benchmarks/generation.py                     # writes results/generation.json
    python benchmarks/generation.py --compile           # one more column: layers through torch.compile

Sampling at temperature 1 in float32 (and in bfloat16 where the name says so) from random weights. Lengths are forced:
no token ends a response. `generate` gets its own static lengths: the longest response of its batch, padded on the left,
with its default cache and attention. Our engine gets what it gets from a trainer: a request for each response, eight
responses to a prompt. Sides take turns within a round; CPU seconds of the process, medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_utils import PreTrainedModel

from hybridflow.models.attention import ATTENTION
from hybridflow.models.load import load_model
from hybridflow.noise import NoiseKey
from hybridflow.protocols.generation import Request, Sampling, generate
from hybridflow.rollout.inline.engine import InlineEngine

from measuring import record

HERE = Path(__file__).resolve().parent
CARRY = HERE.parent / "recipes/carry/task.py"
ANSWERS = 8  # to each prompt


@dataclass(frozen=True)
class Work:
    """Responses to generate: the model, and the prompts and lengths of a batch."""

    model: str
    prompts: list[list[int]]
    lengths: list[int]

    @property
    def tokens(self) -> int:
        """Useful tokens: what is generated beyond a response's length does not count."""
        return sum(self.lengths)


def make_work() -> dict[str, Work]:
    """Makes the batches that are measured."""
    rng = random.Random(0)
    tail = [min(96, max(1, round(rng.lognormvariate(math.log(20.0), 0.8)))) for _ in range(128)]
    tail[0] = 96
    short, long = prompts(rng, 32, 11, 11, 100), prompts(rng, 8, 32, 48, 32_000)
    spread = [min(96, max(1, round(rng.lognormvariate(math.log(20.0), 0.8)))) for _ in range(64)]
    spread[0] = 96
    return {
        "0.8M, equal": Work("0.8M", short, [24] * 256),
        "0.8M, long tail": Work("0.8M", short[:16], tail),
        "0.8M, 32 rows": Work("0.8M", short[:4], [24] * 32),
        "41M, equal": Work("41M", long, [32] * 64),
        "41M, long tail": Work("41M", long, spread),
    }


def prompts(rng: random.Random, count: int, shortest: int, longest: int, vocab: int) -> list[list[int]]:
    """Makes random prompts; each stands for `ANSWERS` responses."""
    return [[rng.randrange(4, vocab) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


def load(name: str) -> PreTrainedModel:
    """Loads the model of the carry recipe (0.8 M parameters), or a Qwen3 of 41.6 M."""
    if name == "0.8M":
        return load_model(f"{CARRY}:tiny_qwen3", seed=0)[0].eval()
    config = Qwen3Config(
        vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    model.set_attn_implementation(ATTENTION)
    return model


def ours(model: PreTrainedModel, work: Work, seed: int, **options: Any) -> None:
    """Generates all responses with the inline engine; its copies of weights are made anew, as after every update."""
    engine = InlineEngine(model, **options)
    requests = [
        Request(tuple(work.prompts[i // ANSWERS]), Sampling(n), NoiseKey(seed, "train", i // ANSWERS, i % ANSWERS))
        for i, n in enumerate(work.lengths)
    ]
    results = generate(engine, requests)
    assert [len(r.token_ids) for r in results] == work.lengths


def theirs(model: PreTrainedModel, work: Work, seed: int) -> None:
    """Generates the same lengths with `generate`: every row runs to the longest."""
    longest = max(map(len, work.prompts))
    rows = [work.prompts[i // ANSWERS] for i in range(len(work.lengths))]
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    model.set_attn_implementation("sdpa")
    torch.manual_seed(seed)
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=max(work.lengths), eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    model.set_attn_implementation(ATTENTION)
    assert out.shape[1] - longest == max(work.lengths)


def sides(compiled: bool) -> dict[str, Callable[[PreTrainedModel, Work, int], None]]:
    """Returns the sides that take turns."""
    found: dict[str, Callable[[PreTrainedModel, Work, int], None]] = {
        "generate of transformers": theirs,
        "ours": ours,
        "ours, bfloat16": lambda m, w, s: ours(m, w, s, dtype=torch.bfloat16),
        "ours, the model's own modules": lambda m, w, s: ours(m, w, s, quick=False),
    }
    if compiled:
        found["ours, compiled"] = lambda m, w, s: ours(m, w, s, compile=True)
    return found


def measure(work: Work, model: PreTrainedModel, rounds: int, compiled: bool) -> dict[str, Any]:
    """Measures CPU seconds of each side in each round; the first, untimed, pays for warming up."""
    spent: dict[str, list[float]] = {name: [] for name in sides(compiled)}
    first: dict[str, float] = {}
    for turn in range(rounds + 1):
        for name, run in sides(compiled).items():
            began = time.process_time()
            run(model, work, turn)
            seconds = time.process_time() - began
            if turn:
                spent[name].append(seconds)
            else:
                first[name] = seconds
    base = statistics.median(spent["generate of transformers"])
    return {
        name: {
            "cpu_s": statistics.median(found),
            "tokens_per_cpu_s": work.tokens / statistics.median(found),
            "times_generate": base / statistics.median(found),
            "cpu_s_of_each_round": found,
            "cpu_s_of_the_first_call": first[name],
        }
        for name, found in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="measure compiled layers too")
    parser.add_argument("--only", help="name of one batch")
    parser.add_argument("--out", type=Path, default=HERE / "results/generation.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results, models = {}, {}
    for name, work in make_work().items():
        if args.only not in (None, name):
            continue
        model = models.setdefault(work.model, None) or load(work.model)
        models[work.model] = model
        results[name] = measure(work, model, args.rounds, args.compile)
        for side, found in results[name].items():
            print(
                f"{name:16} {side:30} {found['cpu_s']:.3f} CPU-s {found['tokens_per_cpu_s']:8.0f} tok/CPU-s "
                f"{found['times_generate']:.2f}x (first call {found['cpu_s_of_the_first_call']:.2f} s)",
                flush=True,
            )
    described = {
        name: {"rows": len(w.lengths), "tokens": w.tokens, "longest": max(w.lengths)} for name, w in make_work().items()
    }
    command = f"OMP_NUM_THREADS=1 python benchmarks/generation.py --rounds {args.rounds}{' --compile' * args.compile}"
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(record(command, described, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
