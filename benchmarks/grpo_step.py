"""The cost of a GRPO step on one thread: here and in TRL on two workloads, and with each engine on a third.

    python benchmarks/grpo_step.py --peer TRL_PYTHON          # both sides in turn, with ratios
    python benchmarks/grpo_step.py                            # this library alone
    .venv-vllm/bin/python benchmarks/grpo_step.py --engines inline vllm --out benchmarks/results/grpo_step_engines.json

Every measurement is a process of its own, one at a time. Seconds are CPU seconds of the process (and wall seconds
beside them), because a machine is seldom quiet. See benchmarks/README.md for what is equal on both sides.

The environment of the peer imports this file too, for the workloads: it has no hybridflow, so nothing at the top here
needs more than the standard library.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import record, run_alone

HERE = Path(__file__).resolve().parent
CARRY = HERE.parent / "recipes/carry"
PROMPTS_PER_STEP, SAMPLES = 16, 8
BETAS = (0.9, 0.99)
TARGET_DIGIT = "7"
PHASES = ("generation", "reward", "update", "publish", "other")


@dataclass(frozen=True)
class Workload:
    """A job that all sides do: 16 prompts x 8 responses a step, one optimizer step on all of them.

    The rate of "long-tail" is so low that the lengths stay what the checkpoint makes them. In "2.1M" no response ends
    before its 64th token: see `endless`.
    """

    name: str
    prompts: str
    reward: str
    max_response_tokens: int
    lr: float


TASK, THIS = CARRY / "task.py", Path(__file__).resolve()
WORKLOADS = {
    "carry": Workload("carry", f"{TASK}:problems", f"{TASK}:score", 32, 1e-4),
    "long-tail": Workload("long-tail", f"{THIS}:digit_prompts", f"{THIS}:digit_share", 96, 1e-6),
    "2.1M": Workload("2.1M", f"{THIS}:digit_prompts", f"{THIS}:digit_share", 64, 1e-6),
}
PEER_WORKLOADS = ("carry", "long-tail")


# --- the long-tail workload: responses of random digits, whose lengths are log-normal ---


def digit_conversations(seed: int = 0, count: int = 12_800) -> list[dict[str, Any]]:
    """Makes SFT rows: responses of log-normal length (mean about 27 tokens, the closing one included, at most 96)."""
    rng = random.Random(f"long-tail-sft-{seed}")
    rows = []
    for _ in range(count):
        length = min(95, max(1, round(rng.lognormvariate(math.log(20.0), 0.8))))
        answer = "".join(rng.choices("0123456789", k=length))
        rows.append({"messages": [*_question(rng), {"role": "assistant", "content": answer}]})
    return rows


def digit_prompts(seed: int = 0, count: int = 4_000) -> list[dict[str, Any]]:
    """Makes RL rows; the ground truth is the digit that is wanted."""
    rng = random.Random(f"long-tail-rl-{seed}")
    return [{"prompt": _question(rng)[0]["content"], "ground_truth": TARGET_DIGIT} for _ in range(count)]


def digit_share(response: str, ground_truth: str) -> float:
    """Returns the share of the wanted digit: it differs between almost all responses, whatever their lengths."""
    return response.count(ground_truth) / max(1, len(response))


def _question(rng: random.Random) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{rng.randint(100, 999)}+{rng.randint(100, 999)}="}]


# --- what both sides record ---


class Meter:
    """CPU and wall seconds of the timed steps, by phase, with lengths and rewards of their responses."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []  # CPU seconds by phase, and "wall"
        self.lengths: list[list[int]] = []
        self.rewards: list[list[float]] = []  # of a step, groups one after the other
        self.prompt_tokens: list[float] = []
        self.turns: list[list[int]] = []  # of each response; empty where all have one
        self.reward_cpu = 0.0  # of the current step

    def results(self, warmup: int) -> dict[str, Any]:
        """Computes means over the steps after the warm-up."""
        steps, lengths, rewards = self.steps[warmup:], self.lengths[warmup:], self.rewards[warmup:]
        mean = {name: statistics.fmean(s[name] for s in steps) for name in steps[0]}
        cpu = sum(mean[p] for p in PHASES)
        tokens = statistics.fmean(sum(x) for x in lengths)
        groups = [r[i : i + SAMPLES] for r in rewards for i in range(0, len(r), SAMPLES)]
        everything = sorted(n for x in lengths for n in x)
        turns = [n for x in self.turns[warmup:] for n in x]
        return {
            "cpu_s_per_step": cpu,
            "wall_s_per_step": mean["wall"],
            **{f"{p}_cpu_s": mean[p] for p in PHASES},
            "cpu_s_of_each_step": [sum(s[p] for p in PHASES) for s in steps],
            "samples_per_cpu_s": len(lengths[0]) / cpu,
            "generated_tokens_per_generation_cpu_s": tokens / mean["generation"],
            "trained_tokens_per_update_cpu_s": tokens / mean["update"],
            "generated_tokens_per_step": tokens,
            "prompt_tokens_mean": statistics.fmean(self.prompt_tokens),
            "response_length": {
                "mean": statistics.fmean(everything),
                "std": statistics.pstdev(everything),
                "max": everything[-1],
                **{f"p{q}": everything[len(everything) * q // 100] for q in (10, 50, 90, 99)},
            },
            "turns_per_response": statistics.fmean(turns) if turns else 1.0,
            "reward_mean": statistics.fmean(x for r in rewards for x in r),
            "equal_reward_groups": statistics.fmean(float(min(g) == max(g)) for g in groups),
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "timed_steps": len(steps),
            "warmup_steps": warmup,
        }


def describe(workload: Workload) -> dict[str, Any]:
    """Describes the workload for the record."""
    return {
        "name": workload.name,
        "prompts_per_step": PROMPTS_PER_STEP,
        "samples_per_prompt": SAMPLES,
        "max_response_tokens": workload.max_response_tokens,
        "temperature": 1.0,
        "updates_per_step": 1,
        "aggregation": "token-mean",
        "lr": workload.lr,
        "betas": BETAS,
        "precision": "float32",
    }


# --- this library ---


def measure(
    workload: Workload,
    model: Path,
    *,
    engine: str = "inline",
    threads: int = 1,
    skip: bool,
    seed: int,
    warmup: int,
    steps: int,
) -> dict[str, Any]:
    """Measures a few training steps."""
    from hybridflow.config.kinds.rl import RlConfig
    from hybridflow.config.load import validate
    from hybridflow.config.locate import load_function

    meter, function = Meter(), load_function(workload.reward)

    def score(response: str, ground_truth: str) -> float:
        began = time.process_time()
        value = float(function(response, ground_truth))
        meter.reward_cpu += time.process_time() - began
        return value

    with tempfile.TemporaryDirectory() as folder:
        config = validate(
            RlConfig,
            {
                "run": {"folder": folder, "seed": seed, "threads": threads, "device": "cpu"},
                "model": {"path": str(model)},
                "data": {"train": workload.prompts, "max_prompt_tokens": 16, "order": "sequential"},
                "reward": {"function": workload.reward},
                "rollout": {"engine": engine, "max_response_tokens": workload.max_response_tokens},
                "algorithm": {"preset": "grpo", "aggregation": "token-mean"},
                "train": {
                    "steps": warmup + steps,
                    "prompts_per_step": PROMPTS_PER_STEP,
                    "samples_per_prompt": SAMPLES,
                    "skip_zero_advantage": skip,
                },
                "optim": {"lr": workload.lr, "betas": BETAS},
                "track": {"console": False, "rollouts_every": 0},
            },
        )
        time_steps(config, score, meter)
    return meter.results(warmup)


def time_steps(config: Any, score: Callable[..., float], meter: Meter) -> None:
    """Runs the moves of `trainers.rl.loop.train` with a clock between them.

    Args:
        config: of the run.
        score: the reward, which adds its seconds to ``meter.reward_cpu``.
        meter: takes what is measured.
    """
    from hybridflow.trainers.rl.loop import estimate, next_groups, publish_weights, update
    from hybridflow.trainers.rl.loop import record as record_step
    from hybridflow.trainers.rl.run import open_run

    with open_run(config, reward=score) as run:
        cpu, wall = time.process_time(), time.perf_counter()
        for step in run.steps():
            meter.reward_cpu = 0.0
            marks = [cpu]
            groups, _ = next_groups(run, step)
            marks.append(time.process_time())
            batch, _ = estimate(run, groups)
            metrics = update(run, batch)
            marks.append(time.process_time())
            publish_weights(run, step)
            marks.append(time.process_time())
            record_step(run, step, groups, batch, metrics)
            marks.append(time.process_time())
            generation, updating, publishing, recording = (b - a for a, b in itertools.pairwise(marks))
            spent = [generation - meter.reward_cpu, meter.reward_cpu, updating, publishing, recording]
            meter.steps.append(dict(zip(PHASES, spent)) | {"wall": time.perf_counter() - wall})
            meter.lengths.append([len(t.token_ids) for g in groups for t in g.trajectories])
            meter.rewards.append([t.reward for g in groups for t in g.trajectories])
            meter.prompt_tokens.append(statistics.fmean(len(g.prompt_ids) for g in groups))
            meter.turns.append([sum(len(s.turns) for s in t.sequences) for g in groups for t in g.trajectories])
            cpu, wall = time.process_time(), time.perf_counter()


def make_model(workload: Workload, folder: Path) -> Path:
    """Makes the checkpoint that both sides start from: the warm-up of the carry recipe, or 150 steps on random
    digits.
    """
    from hybridflow.config.kinds.sft import SftConfig
    from hybridflow.config.load import load_config
    from hybridflow.trainers.sft import train_sft

    target = folder / workload.name
    if workload.name == "2.1M":
        return endless(target / "model")
    if not (target / "model" / "config.json").is_file():
        changes = [f"run.folder={target}", "track.console=false", "checkpoint.every=0"]
        if workload.name == "long-tail":
            changes += [
                f"data.train={Path(__file__).resolve()}:digit_conversations",
                "data.max_tokens=128",
                "train.steps=150",
            ]
        print(f"making the {workload.name} checkpoint in {target}", flush=True)
        train_sft(load_config(CARRY / "sft.yaml", changes, kind=SftConfig))
    return target / "model"


def endless(folder: Path) -> Path:
    """Makes a random Qwen2 of 2.1 M parameters that never ends a response: its first channel rules the end token
    out.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from hybridflow.config.locate import load_function

    if not (folder / "config.json").is_file():
        _, tokenizer = load_function(f"{TASK}:tiny_qwen3")(seed=0)
        config = Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=192, intermediate_size=736, num_hidden_layers=4,
            num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
        model.model.embed_tokens.weight.data[:, 0] = 1.0
        model.lm_head.weight.data[:, 0] = 0.0
        model.lm_head.weight.data[tokenizer.eos_token_id, 0] = -10.0
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


# --- both sides in turn ---


def compare(args: argparse.Namespace, models: dict[str, Path]) -> dict[str, Any]:
    """Runs all measurements, rounds outside and sides inside; returns them and the ratios within each round."""
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in models}
    versions: dict[str, str] = {}
    for turn in range(args.rounds):
        for name, model in models.items():
            common = [name, "--model", str(model), "--seed", str(turn)]
            common += ["--steps", str(args.steps), "--warmup", str(args.warmup)]
            sides = {
                "ours": [sys.executable, __file__, "--only", *common, "--train-all"],
                "ours, equal groups skipped": [sys.executable, __file__, "--only", *common],
            }
            if args.peer:
                sides["trl"] = [args.peer, str(HERE / "peer_trl.py"), *common]
            for side, command in sides.items():
                found = run_alone(command)
                versions |= found["versions"]
                result = found["results"] | {"load_average": found["machine"]["load_average"][0]}
                runs[name].setdefault(side, []).append(result)
                print(f"round {turn + 1}  {name:9}  {summary(side, result)}", flush=True)
    results: dict[str, Any] = {}
    for name, by_side in runs.items():
        results[name] = {"runs": by_side}
        if args.peer:
            results[name]["trl_over_ours"] = {s: ratios(by_side[s], by_side["trl"]) for s in by_side if s != "trl"}
    return {"versions": versions, "results": results}


def compare_engines(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the third workload with each engine, rounds outside and engines inside."""
    model = args.model or make_model(WORKLOADS["2.1M"], args.work)
    runs: dict[str, list[dict[str, Any]]] = {engine: [] for engine in args.engines}
    for turn in range(args.rounds):
        for engine in args.engines:
            command = [sys.executable, __file__, "--only", "2.1M", "--engine", engine, "--model", str(model)]
            command += ["--seed", str(turn), "--steps", str(args.steps), "--warmup", str(args.warmup), "--train-all"]
            command += ["--threads", str(args.threads)]
            found = run_alone(command)
            result = found["results"] | {"load_average": found["machine"]["load_average"][0]}
            assert result["response_length"]["p10"] == WORKLOADS["2.1M"].max_response_tokens
            runs[engine].append(result)
            print(f"round {turn + 1}  {summary(engine, result)}", flush=True)
    middle = {
        engine: {
            name: statistics.median(r[name] for r in found)
            for name in ("cpu_s_per_step", "wall_s_per_step", *(f"{p}_cpu_s" for p in PHASES))
        }
        for engine, found in runs.items()
    }
    return {"medians": middle, "runs": runs}


def ratios(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Computes how many times as much the peer spends as we do: the median over rounds, and each round."""
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "cpu_s_per_sample": lambda r: 1 / r["samples_per_cpu_s"],
        "cpu_s_per_generated_token": lambda r: r["cpu_s_per_step"] / r["generated_tokens_per_step"],
        "generation_cpu_s_per_token": lambda r: 1 / r["generated_tokens_per_generation_cpu_s"],
        "update_cpu_s_per_token": lambda r: 1 / r["trained_tokens_per_update_cpu_s"],
        "wall_s_per_step": lambda r: r["wall_s_per_step"],
        "peak_rss": lambda r: r["peak_rss_gb"],
    }
    found = {name: [of(t) / of(o) for o, t in zip(ours, theirs)] for name, of in measures.items()}
    return {name: {"median": statistics.median(x), "rounds": x} for name, x in found.items()}


def summary(side: str, r: dict[str, Any]) -> str:
    """Describes a measurement in one line."""
    n, speed = r["response_length"], r["generated_tokens_per_generation_cpu_s"]
    phases = ", ".join(f"{p} {r[f'{p}_cpu_s']:.3f}" for p in PHASES)
    return (
        f"{side:26}  {r['cpu_s_per_step']:.3f} CPU-s a step ({phases}), wall {r['wall_s_per_step']:.3f}; "
        f"{r['samples_per_cpu_s']:.0f} samples/CPU-s; generation {speed:.0f} tok/CPU-s; "
        f"lengths mean {n['mean']:.1f} std {n['std']:.1f} p50 {n['p50']} p90 {n['p90']} max {n['max']}; "
        f"equal groups {r['equal_reward_groups']:.0%}; {r['peak_rss_gb']:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--peer", help="Python of an environment with TRL; without it, this library alone is measured")
    parser.add_argument("--rounds", type=int, default=3, help="how often each side is measured")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of a measurement")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--model", type=Path, help="checkpoint of the carry workload (else one is made, once)")
    parser.add_argument("--long-tail-model", type=Path, help="checkpoint of the long-tail workload (else one is made)")
    parser.add_argument("--work", type=Path, default=Path("runs/grpo_step"), help="where checkpoints are made")
    parser.add_argument("--out", type=Path, default=HERE / "results/grpo_step.json")
    parser.add_argument("--engines", nargs="+", help="compare these rollout engines on the third workload instead")
    parser.add_argument("--engine", default="inline", help="with --only: rollout.engine")
    parser.add_argument("--threads", type=int, default=1, help="with --engines or --only: of the process")
    parser.add_argument("--only", choices=WORKLOADS, help="measure this library once, in this process")
    parser.add_argument("--seed", type=int, default=0, help="with --only: of the run")
    parser.add_argument("--train-all", action="store_true", help="with --only: train on groups of equal reward too")
    args = parser.parse_args()
    if args.only:
        workload = WORKLOADS[args.only]
        results = measure(
            workload, args.model or make_model(workload, args.work), engine=args.engine, threads=args.threads,
            skip=not args.train_all, seed=args.seed, warmup=args.warmup, steps=args.steps,
        )  # fmt: skip
        command = f"python benchmarks/grpo_step.py --only {args.only}{' --train-all' * args.train_all}"
        written = record(command, describe(workload), results)
        print(summary("ours", results))
    elif args.engines:
        command = f"python benchmarks/grpo_step.py --engines {' '.join(args.engines)}"
        command += f" --rounds {args.rounds} --steps {args.steps} --warmup {args.warmup} --threads {args.threads}"
        written = record(command, describe(WORKLOADS["2.1M"]), compare_engines(args))
        written["machine"]["threads"] = args.threads
    else:
        given = {"carry": args.model, "long-tail": args.long_tail_model}
        models = {name: path or make_model(WORKLOADS[name], args.work) for name, path in given.items()}
        found = compare(args, models)
        command = f"python benchmarks/grpo_step.py{' --peer TRL_PYTHON' * bool(args.peer)}"
        command += f" --rounds {args.rounds} --steps {args.steps} --warmup {args.warmup}"
        written = record(command, [describe(WORKLOADS[name]) for name in PEER_WORKLOADS], found["results"])
        written["versions"] |= found["versions"]
        for name, result in found["results"].items():
            for side, ratio in result.get("trl_over_ours", {}).items():
                shown = ", ".join(f"{m} {x['median']:.2f}" for m, x in ratio.items())
                print(f"TRL / {side}, {name}: {shown}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(written, indent=1) + "\n")
    print(f"wrote {args.out.name}")


if __name__ == "__main__":
    main()
