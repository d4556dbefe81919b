"""The reference: log-probabilities under weights that never change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.engines.passes import Dtype, Passes, autocast_on
from hybridflow.engines.scoring import TokenScorer
from hybridflow.protocols.training import Scorer


class LocalReference(Scorer):
    """A `Scorer` around a model in this process that is never trained.

    Args:
        model: a model that `models.load` loaded.
        tokens_per_microbatch: most tokens in one forward pass.
        device: where to score.
        dtype: the type of products; "auto" is bfloat16 on a GPU.
        keeps: whether weights are kept in that type too (a reward model's), rather than in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens_per_microbatch: int,
        device: torch.device | str,
        dtype: Dtype = "auto",
        keeps: bool = False,
    ) -> None:
        self.model, self.tokens_per_microbatch = model, tokens_per_microbatch
        self.device = torch.device(device)
        self.model.to(self.device).eval().requires_grad_(False)
        self.dtype, self.keeps = dtype, keeps
        if keeps:
            low = dtype == "bfloat16" or (dtype == "auto" and self.model.device.type != "cpu")
            self.model.to(torch.bfloat16 if low else torch.float32)
        self.scorer = TokenScorer(model)

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `Scorer.score`."""
        device = self.model.device
        within = nullcontext if self.keeps else autocast_on(device, self.dtype)
        passes = Passes(self.scorer, self.model, self.tokens_per_microbatch, device, within=within)
        return passes.score(batch, outputs, temperature)

    def to(self, where: Literal["device", "host"]) -> None:
        """Moves the model to the accelerator or to host memory."""
        self.model.to(self.device if where == "device" else "cpu")


class WithoutAdapters(Scorer):
    """A `Scorer` on the model of an engine, whose adapters are switched off while it scores.

    Without adapters it is the model that the run began with, so no second copy is needed.

    Args:
        engine: the engine that scores.
        model: its model, with adapters.
    """

    def __init__(self, engine: Scorer, model: PreTrainedModel) -> None:
        self.engine, self.model = engine, model

    def score(self, batch: Batch, outputs: Sequence[str], *, temperature: float = 1.0) -> dict[str, Tensor]:
        """See `Scorer.score`."""
        with self.model.disable_adapter():
            return self.engine.score(batch, outputs, temperature=temperature)
