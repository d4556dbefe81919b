"""The steps from the last hidden state to the logits: the output layer, a scale, a soft-cap.

Families differ here, and their own forward would hold all logits at once. For every family that the tests do not cover,
`models.load` compares the logits that are computed here with those of the model itself.

Shapes: M tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Head:
    """Logits are ``softcap * tanh(scale * layer(hidden) / softcap)``, or ``scale * layer(hidden)`` without a cap.

    Args:
        layer: the output layer, often tied to the input embeddings.
        scale: multiplies its output (Cohere's logit_scale; one over Granite's logits_scaling).
        softcap: bound on the logits (Gemma 2); None for none.
    """

    layer: torch.nn.Module
    scale: float = 1.0
    softcap: float | None = None

    def vocabulary(self) -> int:
        """Returns V, the number of logits."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight.shape[0]

    def logits(self, hidden_MD: Tensor, temperature: float = 1.0) -> Tensor:
        """Computes the ``[M, V]`` logits divided by the temperature, in float32 at least."""
        logits_MV = self.layer(hidden_MD)
        logits_MV = logits_MV.to(torch.promote_types(torch.float32, logits_MV.dtype))
        if self.softcap is not None:
            logits_MV = torch.tanh(logits_MV * (self.scale / self.softcap)) * self.softcap
        elif self.scale != 1.0:
            logits_MV = logits_MV * self.scale
        return logits_MV if temperature == 1.0 else logits_MV / temperature


def output_head(model: PreTrainedModel) -> Head:
    """Returns the output layer of a causal language model, with the scale and the soft-cap of its configuration."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return Head(model.get_output_embeddings(), float(scale), getattr(config, "final_logit_softcapping", None))
