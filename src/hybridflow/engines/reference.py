"""The reference: log-probabilities under weights that never change."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.engines.passes import Dtype, Passes, autocast_on
from hybridflow.engines.scoring import TokenScorer


class LocalReference:
    """A `Scorer` around a model in this process that is never trained.

    Args:
        model: a model that `models.load` loaded; or the actor itself, whose adapters are then switched off while it
            scores: what is left is the model that the run began with, without a second copy.
        tokens_per_microbatch: most tokens in one forward pass.
        device: where to score; None leaves the actor where it is.
        dtype: what is multiplied in; "auto" is bfloat16 on a GPU.
        keeps: whether weights are kept in that type too (a reward model's), rather than in float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokens_per_microbatch: int,
        device: torch.device | str | None = None,
        dtype: Dtype = "auto",
        keeps: bool = False,
    ) -> None:
        self.model, self.tokens_per_microbatch = model, tokens_per_microbatch
        self.adapted = hasattr(model, "peft_config")
        if not self.adapted:
            self.model.to(device).eval().requires_grad_(False)
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
        with self.model.disable_adapter() if self.adapted else nullcontext():
            return passes.score(batch, outputs, temperature)
