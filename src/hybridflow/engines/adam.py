"""The optimizer step that every training engine takes, whichever process holds the weights: AdamW, its schedule, and no
step where a loss or gradient is not finite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hybridflow.config.sections.optim import OptimSection
from hybridflow.engines.passes import Sums
from hybridflow.errors import UserError
from hybridflow.protocols.training import Update
from hybridflow.weights.drill import perturb


class AdamEngine(ABC):
    """The state of a training engine besides its model.

    Args:
        trained: the parameters that are trained, by name; of a sharded model, this rank's part of each.
        optim: optimizer and schedule.
        decayed: names of those that weight decay applies to, see `matrices`.
        total_steps: optimizer steps of the whole run, for the schedule's decay.
        name: the prefix of its metrics.
    """

    def __init__(
        self,
        trained: Mapping[str, torch.nn.Parameter],
        optim: OptimSection,
        *,
        decayed: Collection[str],
        total_steps: int,
        name: Literal["actor", "critic"],
    ) -> None:
        self.trained, self.optim, self.total_steps, self.name = dict(trained), optim, total_steps, name
        self.steps_done = 0
        groups = [
            {"params": [p for n, p in self.trained.items() if n in decayed], "weight_decay": optim.weight_decay},
            {"params": [p for n, p in self.trained.items() if n not in decayed], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """Returns AdamW's state, by parameter name: none before the first step."""
        return {name: dict(self.optimizer.state.get(parameter, {})) for name, parameter in self.trained.items()}

    @abstractmethod
    def published(self) -> dict[str, Tensor]:
        """Returns the tensors of a stream: each once, by its first name; of a sharded model, this rank's part."""

    def perturb(self, names: Collection[str] | None = None) -> None:
        """See `TrainEngine.perturb`."""
        perturb(tensor for name, tensor in self.published().items() if names is None or name in names)

    def step(self, sums: Sums, norm: float) -> Update:
        """Takes one optimizer step along the gradients as they are; none where the loss or their norm is not finite.

        Args:
            sums: of the whole mini-batch.
            norm: of the whole gradient before it was clipped.

        Raises:
            UserError: weights are not finite afterwards.
        """
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
        self.require_finite(self.trained, f"after optimizer step {self.steps_done}")
        return Update(metrics)

    def require_finite(self, tensors: Mapping[str, Tensor], when: str) -> None:
        """Raises a UserError unless all these are finite, in every process that holds a part of the model.

        Raises:
            UserError: one is not.
        """
        local = {n: t.to_local() if isinstance(t, DTensor) else t for n, t in tensors.items() if t.is_floating_point()}
        finite = {n: t.detach().isfinite().all() for n, t in local.items() if t.numel()}
        if self.anywhere(bool(finite) and not bool(torch.stack(list(finite.values())).all())):
            bad = [name for name, whole in finite.items() if not whole]
            raise UserError(
                f"the model's weights are not finite {when}" + (f": {bad[0]} and {len(bad) - 1} others" if bad else ""),
                why="nothing is learned or written from here on; "
                f"optim.lr is {self.optim.lr:g}, optim.weight_decay {self.optim.weight_decay:g}",
                fix="lower them and resume from the last checkpoint; if there is none, check model.path",
            )

    def anywhere(self, found: bool) -> bool:
        """Returns whether this is so in any process that holds a part of the model."""
        return found

    def move_moments(self, device: torch.device) -> None:
        """Moves AdamW's state; the number of steps in it stays on the host."""
        for moments in self.optimizer.state.values():
            for name, value in moments.items():
                if isinstance(value, Tensor) and value.ndim:
                    moments[name] = value.to(device)


def matrices(named: Mapping[str, Tensor]) -> set[str]:
    """Returns the names of the tensors that weight decay applies to: matrices, but neither norms nor biases."""
    return {name for name, tensor in named.items() if tensor.ndim > 1}


def learning_rate(optim: OptimSection, step: int, total_steps: int) -> float:
    """Computes the rate of optimizer step `step` (from 0): a linear warm-up, then the decay, ending at ``lr *
    min_lr_ratio``.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = min(1.0, (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps))
    if optim.schedule == "constant":
        return optim.lr
    share = 1 - done if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * share)
