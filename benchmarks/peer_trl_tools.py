"""The workloads of `calculator_step.py` through TRL's GRPOTrainer; run it with an environment that has TRL.

    TRL_PYTHON benchmarks/peer_trl_tools.py trained --model FOLDER --out FILE

As `peer_trl.py`, with `tools`. TRL knows how to read calls only for chat templates that it has itself; so the tokenizer
gets the response template of Qwen3 with this template's markers. The limit of a completion leaves room for results of
tools, which TRL counts.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes/calculator"))
from calculator_step import BETAS, LR, MAX_RESPONSE_TOKENS, PROMPTS_PER_STEP, SAMPLES, WORKLOADS, describe
from trl_clock import Clock

import task
from grpo_step import Meter, summary
from measuring import record

RESULT_TOKENS = 32
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<tool_call>",
            "close_pattern": r"</tool_call>\s*",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"<\|end\|>\s*", "content": "text"},
    },
}


def measure(model: Path, *, seed: int, warmup: int, steps: int) -> dict[str, Any]:
    """Measures a few training steps; generation is `GRPOTrainer._generate`, calls included, and update what is neither
    it nor the reward.
    """
    meter = Meter()
    clock = Clock(meter)

    def score(completions: list[Any], ground_truth: list[str], **_: Any) -> list[float]:
        began = time.process_time()
        values = [task.score(c[-1]["content"], truth) for c, truth in zip(completions, ground_truth)]
        clock.phase["reward"] += time.process_time() - began
        meter.rewards.append(values)
        meter.turns.append([sum(m["role"] == "assistant" for m in c) for c in completions])
        return values

    rows = task.problems(seed=seed, count=PROMPTS_PER_STEP * (warmup + steps))
    prompts = [{"prompt": [{"role": "user", "content": r["prompt"]}], "ground_truth": r["ground_truth"]} for r in rows]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.response_template = RESPONSE_TEMPLATE
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=str(model),
            processing_class=tokenizer,
            reward_funcs=score,
            tools=[task.calculate],
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
                max_completion_length=MAX_RESPONSE_TOKENS + RESULT_TOKENS,
                max_tool_calling_iterations=3,
                temperature=1.0,
                beta=0.0,
                loss_type="dapo",
                max_steps=warmup + steps,
                shuffle_dataset=False,
                learning_rate=LR,
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
            meter.lengths.append([sum(mask) for mask in made[2]])
            return made

        trainer._generate = timed_generate
        trainer.train()
    return meter.results(warmup)


def main() -> None:
    parser = argparse.ArgumentParser(description="The workloads of calculator_step.py through TRL.")
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
    results = measure(args.model, seed=args.seed, warmup=args.warmup, steps=args.steps)
    written = record(f"TRL_PYTHON benchmarks/peer_trl_tools.py {args.workload}", describe(args.workload), results)
    print(summary("trl", results))
    args.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
