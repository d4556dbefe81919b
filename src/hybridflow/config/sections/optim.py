"""The section of the optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hybridflow.config.sections.base import Section

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimSection(Section):
    """AdamW and its schedule."""

    lr: float = Field(1e-6, gt=0, description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay rates.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay (AdamW), on matrices only.")
    clip_grad_norm: float = Field(
        1.0, gt=0, description="Largest global norm of the gradient; larger gradients are scaled down to it."
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Shape of the learning rate's decay after the warm-up."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Number of optimizer steps over which the learning rate rises linearly."
    )
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Learning rate at the end of the decay, as a share of lr.")
