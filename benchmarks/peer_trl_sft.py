"""The workload of `sft_tokens.py` through TRL's SFTTrainer; run it with the Python of an environment that has TRL."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from measuring import record
from sft_tokens import SEQUENCES, WORKLOAD, conversations, results_of


class Clock(TrainerCallback):
    """A step lasts from the end of the one before it to its own end."""

    def __init__(self) -> None:
        self.cpu_s: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.cpu_s.append(time.process_time() - self.began)
        self.began = time.process_time()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bars()
    count = SEQUENCES * (args.warmup + args.steps)
    rows = [{"prompt": r["messages"][:1], "completion": r["messages"][1:]} for r in conversations(0)[:count]]
    clock, tokens = Clock(), []
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=str(args.model),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            train_dataset=Dataset.from_list(rows),
            callbacks=[clock],
            args=SFTConfig(
                output_dir=folder,
                model_init_kwargs={"dtype": "float32"},
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=SEQUENCES,
                max_length=256,
                packing=False,
                max_steps=args.warmup + args.steps,
                learning_rate=WORKLOAD["lr"],
                lr_scheduler_type="constant",
                max_grad_norm=1.0,
                weight_decay=0.0,
                logging_strategy="no",
                save_strategy="no",
                eval_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
        )
        compute, losses = trainer.compute_loss, []

        def counted(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Any:
            tokens.append(int(inputs["attention_mask"].sum()))
            found = compute(model, inputs, *rest, **more)
            losses.append(float((found[0] if isinstance(found, tuple) else found).detach()))
            return found

        trainer.compute_loss = counted
        trainer.train()
    results = results_of(clock.cpu_s, tokens, losses, args.warmup)
    args.out.write_text(json.dumps(record("TRL_PYTHON benchmarks/peer_trl_sft.py MODEL", WORKLOAD, results)))


if __name__ == "__main__":
    main()
