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
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay, on matrices only.")
    clip_grad_norm: float = Field(1.0, gt=0, description="Gradients are scaled down to this global norm.")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="Decay after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Optimizer steps over which the rate rises linearly.")
    min_lr_ratio: float = Field(0.0, ge=0, le=1, description="Where the decay ends, as a share of lr.")
