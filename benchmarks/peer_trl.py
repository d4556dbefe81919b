"""The workloads of `grpo_step.py` through TRL's GRPOTrainer; run it with the Python of an environment that has TRL.

    TRL_PYTHON benchmarks/peer_trl.py carry --model FOLDER --out FILE

float32 on the CPU, one thread, beta 0, one on-policy update a step on one micro-batch of all 128 responses. The loss is
"dapo": the mean over all tokens of the batch, as "token-mean" here. Gradient checkpointing, bfloat16 and everything
that logs, saves or evaluates are off.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))  # the task draws its problems with this library
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes/carry"))
from trl_clock import Clock

import grpo_step
import task
from grpo_step import BETAS, PROMPTS_PER_STEP, SAMPLES, WORKLOADS, Meter, describe, summary
from measuring import record

PROMPTS = {"carry": task.problems, "long-tail": grpo_step.digit_prompts}
REWARDS = {"carry": task.score, "long-tail": grpo_step.digit_share}


def measure(name: str, model: Path, *, seed: int, warmup: int, steps: int) -> dict[str, Any]:
    """Measures a few training steps; generation is `GRPOTrainer._generate`, update what is neither it nor the
    reward.
    """
    workload, meter = WORKLOADS[name], Meter()
    clock = Clock(meter)

    def score(
        completions: list[Any], completion_ids: list[list[int]], ground_truth: list[str], **_: Any
    ) -> list[float]:
        began = time.process_time()
        values = [REWARDS[name](c[0]["content"], truth) for c, truth in zip(completions, ground_truth)]
        clock.phase["reward"] += time.process_time() - began
        meter.lengths.append([len(ids) for ids in completion_ids])
        meter.rewards.append(values)
        return values

    rows = PROMPTS[name](seed=seed)[: PROMPTS_PER_STEP * (warmup + steps)]
    prompts = [{"prompt": [{"role": "user", "content": r["prompt"]}], "ground_truth": r["ground_truth"]} for r in rows]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(model),
            processing_class=AutoTokenizer.from_pretrained(model),
            reward_funcs=score,
            train_dataset=Dataset.from_list(prompts),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                seed=seed,
                model_init_kwargs={"dtype": "float32"},
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=PROMPTS_PER_STEP * SAMPLES,
                gradient_accumulation_steps=1,
                steps_per_generation=1,
                num_iterations=1,
                num_generations=SAMPLES,
                max_completion_length=workload.max_response_tokens,
                temperature=1.0,
                beta=0.0,
                loss_type="dapo",
                max_steps=warmup + steps,
                shuffle_dataset=False,
                learning_rate=workload.lr,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=0.0,
                max_grad_norm=1.0,
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
        )
        generate = trainer._generate

        def timed_generate(prompts: list[Any], *rest: Any) -> Any:
            began = time.process_time()
            made = generate(prompts, *rest)
            clock.phase["generation"] += time.process_time() - began
            meter.prompt_tokens.append(sum(map(len, made[0])) / len(made[0]))
            return made

        trainer._generate = timed_generate
        trainer.train()
    return meter.results(warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description="The workloads of grpo_step.py through TRL.")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    disable_progress_bars()
    results = measure(args.workload, args.model, seed=args.seed, warmup=args.warmup, steps=args.steps)
    workload = describe(WORKLOADS[args.workload]) | {"loss_type": "dapo"}
    written = record(f"TRL_PYTHON benchmarks/peer_trl.py {args.workload}", workload, results)
    print(summary("trl", results))
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
