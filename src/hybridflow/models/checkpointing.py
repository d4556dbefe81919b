"""Activation checkpointing: each layer keeps its input alone, and computes the rest again in the backward pass.

Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174.
"""

from __future__ import annotations

from transformers.modeling_utils import PreTrainedModel

from hybridflow.errors import UserError


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Switches it on for forward passes in training mode; values and gradients stay the same, bit for bit on a CPU.

    Raises:
        UserError: the model's class cannot do it.
    """
    # transformers 5.23 has renamed it; the old name still works and warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise UserError(
            f"{type(model).__name__} has no activation checkpointing: {error}",
            fix="leave out model.activation_checkpointing",
        ) from error
