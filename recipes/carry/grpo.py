"""The GRPO recipe as a program: copy it and change any line of the loop.

    python recipes/carry/grpo.py run.folder=runs/my-grpo

It ends with the same weights as `hybridflow train recipes/carry/grpo.yaml`.
"""

import sys

import hybridflow as hf
from hybridflow.algorithms.advantage.grpo import grpo
from hybridflow.algorithms.aggregation import token_weights
from hybridflow.trainers.rl.batches import batch_of
from hybridflow.trainers.rl.losses import with_signal


def score(response: str, ground_truth: str) -> float:
    return float(response.rpartition("#")[2].strip() == ground_truth)


config = hf.load_config("recipes/carry/grpo.yaml", sys.argv[1:])
with hf.open_run(config, reward=score) as run:
    for step in run.steps():
        groups = run.source.collect(step, run.sampler.take(16))  # generate, score
        batch = batch_of(groups)
        advantage_B = grpo(batch["reward_B"], batch["group_B"])
        batch["advantage_T"] = advantage_B[batch.sequence_of()] * batch["loss_mask_T"]
        batch["policy_weight_T"] = token_weights(batch, "token-mean", norm=32)
        result = run.engine.update(with_signal(batch), hf.Loss("policy", {"policy_loss": "ppo_clip"}))
        sent = run.publish(step)
        hf.record(run, step, groups, batch, result.metrics | sent)
    run.finish()
