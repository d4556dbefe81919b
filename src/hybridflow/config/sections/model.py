"""The sections that name models: the one that is trained, its adapters, its critic."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from hybridflow.config.paths import ReadPath
from hybridflow.config.sections.base import Section
from hybridflow.config.sections.engine import EngineSection
from hybridflow.config.sections.optim import OptimSection


class LoraSection(Section):
    """Low-rank adapters (peft) instead of full training."""

    rank: PositiveInt = Field(8, description="Rank of the adapter matrices.")
    alpha: PositiveFloat = Field(16, description="Scale: the adapter's output is multiplied by alpha / rank.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Modules that get adapters: ends of their paths, such as q_proj, or all-linear."
    )


class ModelSection(Section):
    """The model to train or to ask."""

    path: ReadPath = Field(
        description="Hugging Face folder, org/name on the hub, modelscope://org/name, or file.py:function returning "
        "(model, tokenizer)."
    )
    lora: LoraSection | None = Field(None, description="Train adapters of this shape; unset trains all weights.")
    packing: bool = Field(
        True,
        description="Run sequences side by side without padding. false is for families that cannot: they are padded, "
        "with their own attention.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep only each layer's input for the backward pass and compute the rest again: less memory for "
        "long sequences, for one more forward pass.",
    )
    liger: bool = Field(
        False,
        description="Use Liger's fused kernels (norms, rotary embedding, gated layers) on a GPU; needs "
        "hybridflow[liger].",
    )
    trust_remote_code: bool = Field(
        False, description="Run code that the model's folder brings along; only for code that you have read."
    )


class RlModelSection(ModelSection):
    """The model to train, and the one that it is held against."""

    reference: ReadPath | None = Field(
        None,
        description="The reference of the KL terms (algorithm.kl_reward_coef, kl_loss_coef), as in model.path; unset: "
        "the model that the run began with. Its weights never change.",
    )
    reference_engine: EngineSection | None = Field(
        None, description="How the reference is computed: what differs from engine; unset: nothing."
    )


class CriticSection(Section):
    """The model that says what a state is worth, for advantages that need one."""

    path: ReadPath | None = Field(
        None, description="Where its trunk begins, as in model.path; unset: the actor's model."
    )
    lora: LoraSection | None = Field(None, description="Train adapters of this shape; unset trains all weights.")
    shared_trunk: bool = Field(
        False,
        description="The value head stands on the actor's own trunk and is trained in the actor's updates, with weight "
        "algorithm.value_coef; there is no second model.",
    )
    optim: OptimSection | None = Field(
        None, description="AdamW of the critic and its schedule: what differs from optim; unset: nothing."
    )
    engine: EngineSection | None = Field(
        None, description="How the critic is computed: what differs from engine; unset: nothing."
    )
    epochs_per_step: PositiveInt | None = Field(
        None, description="The critic's own passes over a step's answers; unset: as in train.epochs_per_step."
    )
    warmup_steps: int = Field(0, ge=0, description="First steps of the run, in which the critic alone is trained.")
