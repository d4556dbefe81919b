"""Training in this process, on one device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.config.sections import OptimSection
from hybridflow.engines.microbatch import accumulate_gradient, autocast_on, score_microbatches
from hybridflow.models.value import ValueHead
from hybridflow.protocols import Loss, Update, WeightStream
from hybridflow.weights.stream import stream_of


class LocalEngine:
    """A `TrainEngine` around one model: AdamW on float32 master weights, bfloat16 compute on a GPU.

    Args:
        model: a model that `models.load` loaded; parameters that require no gradient are left alone (LoRA).
        optim: optimizer and schedule.
        total_steps: optimizer steps of the whole run, for the schedule's decay.
        tokens_per_microbatch: most tokens in one forward pass.
        device: where to train.
        value_head: trained with the model and asked for "value" scores: it makes the model a critic, or an actor whose
            trunk is the critic's too. Its weights are not streamed.
        name: what its metrics begin with.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optim: OptimSection,
        *,
        total_steps: int,
        tokens_per_microbatch: int,
        device: torch.device | str = "cpu",
        value_head: ValueHead | None = None,
        name: Literal["actor", "critic"] = "actor",
    ) -> None:
        self.model = model.to(device).train()
        self.value_head = None if value_head is None else value_head.to(device)
        self.name = name
        self.optim = optim
        self.total_steps = total_steps
        self.tokens_per_microbatch = tokens_per_microbatch
        self.device = torch.device(device)
        self.steps_done = 0
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if value_head is not None:
            self.trained |= {f"value_head.{n}": p for n, p in value_head.named_parameters()}
        matrices = [p for p in self.trained.values() if p.ndim > 1]
        others = [p for p in self.trained.values() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `TrainEngine.score`."""
        return score_microbatches(
            self.model,
            batch,
            outputs,
            temperature=temperature,
            tokens_per_microbatch=self.tokens_per_microbatch,
            autocast=autocast_on(self.device),
            value_head=self.value_head,
        )

    def update(self, batch: Batch, loss: Loss) -> Update:
        """See `TrainEngine.update`."""
        if not len(batch):
            return Update({})  # nothing to learn from: no step, and the schedule stands still
        self.optimizer.zero_grad(set_to_none=True)
        sums = accumulate_gradient(
            self.model,
            batch,
            loss,
            tokens_per_microbatch=self.tokens_per_microbatch,
            autocast=autocast_on(self.device),
            value_head=self.value_head,
        )
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained.values(), self.optim.clip_grad_norm))
        lr = learning_rate(self.optim, self.steps_done, self.total_steps)
        own = {"loss": sums.loss, "grad_norm": norm, "lr": lr}
        metrics = sums.metrics() | {f"{self.name}/{key}": value for key, value in own.items()}
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            self.optimizer.zero_grad(set_to_none=True)
            return Update(metrics, applied=False, bad_rows=sums.bad_rows)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.steps_done += 1
        return Update(metrics)

    def state(self) -> dict[str, Any]:
        """See `TrainEngine.state`: the steps done and AdamW's moments, by parameter name."""
        moments: dict[str, dict[str, Tensor]] = {}
        for name, parameter in self.trained.items():
            kept = self.optimizer.state.get(parameter, {})
            moments[name] = {k: torch.as_tensor(v).detach() for k, v in kept.items()}
        return {"steps_done": self.steps_done, "moments": moments}

    def load(self, state: Mapping[str, Any]) -> None:
        """See `TrainEngine.load`."""
        self.steps_done = int(state["steps_done"])
        for name, moments in state["moments"].items():
            parameter = self.trained[name]
            self.optimizer.state[parameter] = {
                k: v.to(device=self.device if v.ndim else v.device).clone() for k, v in moments.items()
            }

    def stream_weights(self) -> WeightStream:
        """See `TrainEngine.stream_weights`."""
        return stream_of(self.model, same_memory=True)

    def to(self, where: Literal["device", "host"]) -> None:
        """See `TrainEngine.to`."""
        target = self.device if where == "device" else torch.device("cpu")
        self.model.to(target)
        if self.value_head is not None:
            self.value_head.to(target)
        for moments in self.optimizer.state.values():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.ndim:
                    moments[name] = value.to(target)


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): a linear warm-up, then the decay, ending at ``lr * min_lr_ratio``."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    if optim.schedule == "constant":
        return optim.lr
    share = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
