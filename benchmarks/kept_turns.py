"""What later turns read again on the inline engine, and what a step gains from keeping each turn's keys and values.

    python benchmarks/kept_turns.py --out benchmarks/results/kept_turns.json

A step of a run with a tool, without its texts: 8 prompts x 8 trajectories are generated turn by turn, each turn sees
the tokens before it and what was observed, and one optimizer step is taken on all of them. The model is the calculator
recipe's size. Every measurement is a process of its own on one thread; seconds are CPU seconds of a step.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import record, run_alone

PROMPTS, SAMPLES, STEPS = 8, 8, 8
VOCABULARY = 51


@dataclass(frozen=True)
class Workload:
    """How long everything is, in tokens; turns vary by 30 % around their length."""

    prompt: int
    turn: int
    observation: int
    turns: int


WORKLOADS = {
    "a call, short prompt": Workload(30, 12, 10, 2),
    "a call, tools in the prompt": Workload(100, 12, 10, 2),
    "five turns": Workload(100, 12, 10, 5),
}


def measure(workload: Workload, keep: bool) -> dict[str, Any]:
    """Returns the means of some steps, the first one left out."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from hybridflow.algorithms.aggregation import token_weights
    from hybridflow.config.sections.optim import OptimSection
    from hybridflow.engines.local import LocalEngine
    from hybridflow.models.attention import ATTENTION
    from hybridflow.protocols.training import Loss
    from hybridflow.rollout.inline.engine import InlineEngine
    from hybridflow.trainers.rl.batches import batch_of
    from hybridflow.weights.stream import stream_of

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
        )
    )  # fmt: skip
    model.set_attn_implementation(ATTENTION)
    engine = InlineEngine(model, same_memory=True, keep_turns=keep)
    trainer = LocalEngine(model, OptimSection(lr=1e-6), total_steps=STEPS, tokens_per_microbatch=8192)
    steps: list[dict[str, float]] = []
    for step in range(STEPS):
        read, began = engine.tokens_read, time.process_time()
        groups, sampled = _generate(engine, workload, step)
        generated = time.process_time()
        engine.forget()
        batch = batch_of(groups)
        batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=1)
        trainer.update(batch, Loss("cross_entropy"))
        engine.update_weights(stream_of(model, same_memory=True), step + 1)
        ended = time.process_time()
        steps.append(
            {
                "read_per_sampled_token": (engine.tokens_read - read) / sampled,
                "generation_s": generated - began,
                "step_s": ended - began,
            }
        )
    return {name: round(statistics.mean(s[name] for s in steps[1:]), 4) for name in steps[0]}


def _generate(engine: Any, workload: Workload, step: int) -> tuple[list[Any], int]:
    """Returns the groups of a step, and how many of their tokens were sampled."""
    from hybridflow.noise import NoiseKey
    from hybridflow.protocols.generation import Request, Sampling, generate
    from hybridflow.protocols.groups import Group, TokenSequence, Trajectory, Turn

    rng = random.Random(step)
    prompts = [[rng.randrange(VOCABULARY) for _ in range(workload.prompt)] for _ in range(PROMPTS)]
    made = [TokenSequence(prompts[i // SAMPLES], [], [], [], []) for i in range(PROMPTS * SAMPLES)]
    for turn in range(workload.turns):
        asked = [
            Request(
                (*s.prompt_ids, *s.token_ids),
                Sampling(max(2, int(workload.turn * rng.uniform(0.7, 1.3)))),
                NoiseKey(step, "train", i // SAMPLES, i % SAMPLES),
                position=sum(t.end - t.start for t in s.turns),
            )
            for i, s in enumerate(made)
        ]
        for s, result in zip(made, generate(engine, asked)):
            s.turns.append(Turn(len(s.token_ids), len(s.token_ids) + len(result.token_ids), result.finish_reason))
            seen = [rng.randrange(VOCABULARY) for _ in range(workload.observation * (turn + 1 < workload.turns))]
            s.token_ids += result.token_ids + seen
            s.logps += result.logps + [0.0] * len(seen)
    trajectories = [Trajectory(i % SAMPLES, [s], "done", "", 0.0) for i, s in enumerate(made)]
    groups = [
        Group(draw, draw, prompt, trajectories[draw * SAMPLES : (draw + 1) * SAMPLES])
        for draw, prompt in enumerate(prompts)
    ]
    return groups, sum(t.length for t in trajectories)


def main() -> None:
    """Measures all workloads, three times each, in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("WORKLOAD", "KEEP"), help="one measurement, in this process")
    args = parser.parse_args()
    if args.one:
        args.out.write_text(json.dumps(measure(WORKLOADS[args.one[0]], args.one[1] == "kept")))
        return
    results: dict[str, Any] = {}
    for name in WORKLOADS:
        found: dict[str, list[dict[str, float]]] = {"read again": [], "kept": []}
        for _ in range(args.rounds):
            for way, runs in found.items():
                runs.append(run_alone([sys.executable, str(Path(__file__)), "--one", name, way]))
        results[name] = {
            way: {key: round(statistics.median(run[key] for run in runs), 4) for key in runs[0]}
            for way, runs in found.items()
        }
        before, after = results[name]["read again"]["step_s"], results[name]["kept"]["step_s"]
        results[name]["a step is shorter by"] = round(1 - after / before, 3)
        print(name, json.dumps(results[name]), flush=True)
    if args.out is not None:
        workload = {name: vars(w) for name, w in WORKLOADS.items()} | {"prompts": PROMPTS, "samples": SAMPLES}
        command = f"python benchmarks/kept_turns.py --out {args.out}"
        args.out.write_text(json.dumps(record(command, workload, results), indent=1) + "\n")


if __name__ == "__main__":
    main()
