"""A model, its value head and its processes as one module, whose forward pass maps tokens to scores.

Engines call this module and nothing inside it: sharding gathers weights in the hooks of a forward pass, and the output
layer is read by `models.log_probs`, not through a forward pass of its own.

Shapes: M tokens that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from hybridflow.batch import Batch
from hybridflow.models.classifier import state_reader
from hybridflow.models.forward import score_tokens, score_values
from hybridflow.models.ulysses import SequenceParallel
from hybridflow.models.value import ValueHead


class TokenScorer(torch.nn.Module):
    """From sequences to the scores of their tokens.

    Args:
        model: a model that `models.load` loaded.
        value_head: reads values from its last hidden states; None for a model without, and for a classifier, which
            has a layer of its own for that.
        sp: the ranks that share the tokens of a pass; None for one process.
    """

    def __init__(
        self, model: PreTrainedModel, value_head: ValueHead | None = None, sp: SequenceParallel | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.value_head = value_head
        self.sp = sp

    def forward(
        self, part: Batch, outputs: Sequence[str], temperature: float, entropy_gradient: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs one pass: returns where the scored tokens stand on the T axis ``[M]``, and ``[M]`` scores by name.

        Args:
            part: see `models.forward.hidden_states`.
            outputs: see `protocols.training.Scorer.score`; values alone need no logits.
            temperature: divides the logits.
            entropy_gradient: whether entropies have a gradient.
        """
        reader = self.value_head if self.value_head is not None else state_reader(self.model)
        assert reader is not None or "value" not in outputs, "values need a value head"
        if reader is not None and tuple(outputs) == ("value",):
            index_M, value_M = score_values(self.model, part, reader, sp=self.sp)
            return index_M, {"value": value_M.clone()}
        entropy: Literal["with gradient", "detached"] = "with gradient" if entropy_gradient else "detached"
        scores = score_tokens(
            self.model,
            part,
            temperature=temperature,
            entropy=entropy if "entropy" in outputs else "no",
            value_head=self.value_head if "value" in outputs else None,
            sum_pi_squared="sum_pi_squared" in outputs,
            log_mass="log_mass" in outputs,
            sp=self.sp,
        )
        # Clones, because FSDP2 hooks into these tensors: a change in place of a view of another tensor would bypass the
        # hook.
        return scores.index_M, {name: score_M.clone() for name, score_M in scores.named().items()}
